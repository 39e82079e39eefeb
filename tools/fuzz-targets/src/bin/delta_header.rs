//! Sectors 0 and 1 of a delta: any bytes decode to something or an error, and what was decoded is encoded the same.
#![no_main]

use fuzz_targets::Choices;
use libfuzzer_sys::fuzz_target;
use pando::block::delta::header::{Header, HeaderFault, Phase, Sector, Session};
use pando::block::delta::layout::Layout;
use pando::units::ClusterSize;

/// Length of the fields that the checksum covers: of the header, and of the session.
const HEADER_FIELDS: usize = 104;
const SESSION_FIELDS: usize = 40;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let kind = choices.below(3);
    let mut sector: Sector = [0; 512];
    choices.fill(&mut sector);
    match kind {
        0 => seal(&mut sector, b"PANDODLT\x01\0\0\0", HEADER_FIELDS),
        1 => seal(&mut sector, b"PANDOSES", SESSION_FIELDS),
        _ => {}
    }
    check_header(&sector);
    check_session(&sector);
});

/// Makes a sector's fields pass the first checks, so that those behind them are reached.
fn seal(sector: &mut Sector, start: &[u8], fields: usize) {
    sector[..start.len()].copy_from_slice(start);
    let checksum = crc32c::crc32c(&sector[..fields]);
    sector[fields..fields + 4].copy_from_slice(&checksum.to_le_bytes());
}

fn check_header(sector: &Sector) {
    let header = match Header::decode(sector) {
        Ok(header) => header,
        Err(fault) => return check_fault(&fault),
    };
    let encoded = header.encode();
    assert_eq!(Header::decode(&encoded).as_ref(), Ok(&header));
    // Bits that a later program may set, what stands in the place of no base, and what lies behind the fields are not kept.
    let mut kept = *sector;
    kept[24..32].fill(0);
    if header.base.is_none() {
        kept[64..HEADER_FIELDS].fill(0);
    }
    kept[HEADER_FIELDS + 4..].fill(0);
    seal(&mut kept, b"", HEADER_FIELDS);
    assert_eq!(encoded, kept);
    // What follows from a header is as bounded as the header says.
    let layout = header.layout;
    assert!(layout.virtual_bytes() <= Layout::VIRTUAL_BYTES_MAX && layout.virtual_bytes().is_multiple_of(512));
    assert!(ClusterSize::from_bytes(layout.cluster().bytes()) == Some(layout.cluster()));
    assert!(layout.file_bytes() >= layout.virtual_bytes());
    assert!(layout.file_bytes() <= i64::MAX as u64);
    assert!(header.base.is_none_or(|base| base.bytes <= layout.virtual_bytes()));
}

fn check_session(sector: &Sector) {
    let session = match Session::decode(sector) {
        Ok(session) => session,
        Err(fault) => return check_fault(&fault),
    };
    let mut kept = *sector;
    kept[SESSION_FIELDS + 4..].fill(0);
    assert_eq!(session.encode(), kept);
    assert!(matches!(session.phase, Phase::Closed | Phase::Open));
}

/// Every fault can be told to a person.
fn check_fault(fault: &HeaderFault) {
    assert!(!fault.to_string().is_empty());
}
