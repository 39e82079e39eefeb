//! Chains that a driver must not make: each is named, and leaves the ring as it was.
//!
//! The reference ends such a chain in silence, with what it has got until then; a request could then be carried out in part.
//! It is laxer in these points, and a test below shows each:
//!
//! | chain | reference | ours |
//! |---|---|---|
//! | goes on with a descriptor that does not exist | ends | [`ChainError::Next`] |
//! | visits a descriptor twice | ends after as many as the table has | [`ChainError::TooLong`] |
//! | longer than what one vectored call takes, in an indirect table | goes on, up to 65535 | [`ChainError::TooLong`] |
//! | a buffer outside of memory | is given out | [`ChainError::Outside`] |
//! | a readable buffer behind a writable one | is given out | [`ChainError::Order`] |
//! | an indirect table of no descriptors, or not of whole ones | ends | [`ChainError::Table`] |
//! | an indirect table outside of memory | ends | [`ChainError::Table`] |
//! | an indirect descriptor in an indirect table | ends | [`ChainError::Nested`] |
//! | an indirect descriptor with another one behind it | the other one is ignored | [`ChainError::Nested`] |
//! | an indirect table of more than 65535 descriptors | ends | only those that are used count |

use std::sync::Arc;

use pando::vhost_user::ring::{CHAIN_DESCRIPTORS_MAX, Chain, ChainError};
use rand::RngExt;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{QueueOwnedT, QueueT};

use super::guest::{BUFFERS, Guest, INDIRECT, NEXT, NOWHERE, TABLES, WRITE, each_seed};

const SIZE: u16 = 8;

/// A ring whose only request is made of these descriptors, the first the head, and of this indirect table.
struct Case {
    descriptors: Vec<Descriptor>,
    table: Vec<Descriptor>,
}

impl Case {
    fn direct(descriptors: &[Descriptor]) -> Case {
        Case { descriptors: descriptors.to_vec(), table: Vec::new() }
    }

    /// A table that is entered by its first descriptor, with the right length.
    fn indirect(table: &[Descriptor]) -> Case {
        Case { descriptors: vec![to_table(table.len() as u32 * 16, INDIRECT)], table: table.to_vec() }
    }

    /// What we say, and how many descriptors the reference gives out.
    fn run(&self) -> (Result<usize, ChainError>, usize) {
        let mut guest = Guest::new(SIZE, true, 0);
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            guest.set_descriptor(index as u16, *descriptor);
        }
        for (index, descriptor) in self.table.iter().enumerate() {
            guest.write_table(TABLES.start, index as u16, *descriptor);
        }
        let (mut ring, mut queue) = (guest.ring(), guest.queue());
        guest.offer(0);
        let mut chain = Chain::default();
        assert_eq!((ring.waiting(), ring.take()), (Ok(1), Ok(0)));
        let memory = Arc::clone(&guest.memory);
        let result = ring.chain(0, &memory, &mut chain);
        let reference = queue.pop_descriptor_chain(&guest.mmap).unwrap().count();
        // The ring goes on: the request can be completed, and the next one is served.
        ring.complete(0, 0);
        assert!(ring.publish());
        guest.set_descriptor(1, buffer(0));
        guest.offer(1);
        assert_eq!((ring.waiting(), ring.take()), (Ok(1), Ok(1)));
        let mut after = Chain::default();
        assert_eq!(ring.chain(1, &guest.memory, &mut after), Ok(()));
        assert_eq!((after.readable.len(), after.writable.len()), (1, 0));
        (result.map(|()| chain.readable.len() + chain.writable.len()), reference)
    }

    #[track_caller]
    fn is_refused(&self, expected: ChainError, reference: usize) {
        assert_eq!(self.run(), (Err(expected), reference));
    }
}

fn buffer(flags: u16) -> Descriptor {
    Descriptor::new(BUFFERS[0].start, 512, flags, 1)
}

fn followed_by(next: u16) -> Descriptor {
    Descriptor::new(BUFFERS[0].start, 512, NEXT, next)
}

fn to_table(len: u32, flags: u16) -> Descriptor {
    Descriptor::new(TABLES.start, len, flags, 1)
}

#[test]
fn a_descriptor_that_does_not_exist() {
    for next in [SIZE, SIZE + 1, u16::MAX] {
        Case::direct(&[followed_by(next)]).is_refused(ChainError::Next { next, len: SIZE.into() }, 1);
    }
    // The table's length counts here, and not the ring's.
    for next in [2, SIZE, u16::MAX] {
        Case::indirect(&[followed_by(1), followed_by(next)]).is_refused(ChainError::Next { next, len: 2 }, 2);
    }
    assert_eq!(Case::indirect(&[followed_by(1), buffer(0)]).run(), (Ok(2), 2));
}

#[test]
fn a_chain_that_loops() {
    Case::direct(&[followed_by(0)]).is_refused(ChainError::TooLong, SIZE.into());
    Case::direct(&[followed_by(1), followed_by(2), followed_by(1)]).is_refused(ChainError::TooLong, SIZE.into());
    Case::indirect(&[followed_by(0)]).is_refused(ChainError::TooLong, 1);
    Case::indirect(&[followed_by(1), followed_by(2), followed_by(0)]).is_refused(ChainError::TooLong, 3);
}

#[test]
fn a_chain_that_is_too_long() {
    let table = |len: usize| {
        let mut table: Vec<Descriptor> = (1..=len).map(|next| followed_by(next as u16)).collect();
        table[len - 1] = buffer(WRITE);
        Case::indirect(&table)
    };
    assert_eq!(table(CHAIN_DESCRIPTORS_MAX).run(), (Ok(CHAIN_DESCRIPTORS_MAX), CHAIN_DESCRIPTORS_MAX));
    for len in [CHAIN_DESCRIPTORS_MAX + 1, 2000, 8000] {
        table(len).is_refused(ChainError::TooLong, len);
    }
}

/// A guest can name 65535 descriptors and far more; what they cost is bounded by what is used.
#[test]
fn a_table_of_any_length_costs_what_is_used_of_it() {
    for (entries, reference) in [(65535, 2), (65536, 0), (u32::MAX / 16, 0)] {
        let case = Case { descriptors: vec![to_table(entries * 16, INDIRECT)], table: vec![followed_by(1), buffer(0)] };
        assert_eq!(case.run(), (Ok(2), reference), "{entries} entries");
    }
    let everything = Case {
        descriptors: vec![to_table(65535 * 16, INDIRECT)],
        table: (1..=8192u16).map(|next| followed_by(next % 8192)).collect(),
    };
    everything.is_refused(ChainError::TooLong, 65535);
}

#[test]
fn a_buffer_outside_of_memory() {
    for (address, len) in
        [(NOWHERE, 1), (NOWHERE - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (0, u32::MAX), (1 << 40, 512)]
    {
        for flags in [0, WRITE] {
            let descriptor = Descriptor::new(address, len, flags, 0);
            Case::direct(&[descriptor]).is_refused(ChainError::Outside { address, len }, 1);
            Case::indirect(&[descriptor]).is_refused(ChainError::Outside { address, len }, 1);
        }
    }
    // No bytes lie nowhere.
    assert_eq!(Case::direct(&[Descriptor::new(u64::MAX, 0, WRITE, 0)]).run(), (Ok(0), 1));
    assert_eq!(Case::direct(&[Descriptor::new(NOWHERE - 1, 1, 0, 0)]).run(), (Ok(1), 1));
}

#[test]
fn a_readable_buffer_behind_a_writable_one() {
    let chain = [buffer(WRITE | NEXT), Descriptor::new(0, 512, 0, 0)];
    Case::direct(&chain).is_refused(ChainError::Order, 2);
    Case::indirect(&chain).is_refused(ChainError::Order, 2);
    let across = Case { descriptors: vec![buffer(WRITE | NEXT), to_table(16, INDIRECT)], table: vec![buffer(0)] };
    across.is_refused(ChainError::Order, 2);
}

#[test]
fn a_table_that_is_none() {
    for len in [0, 1, 15, 17, u32::MAX] {
        let case = Case { descriptors: vec![to_table(len, INDIRECT)], table: vec![buffer(0)] };
        case.is_refused(ChainError::Table { address: TABLES.start, len }, 0);
    }
    for address in [NOWHERE, NOWHERE - 8, u64::MAX - 15, u64::MAX] {
        let len = 32;
        let case = Case::direct(&[Descriptor::new(address, len, INDIRECT, 0)]);
        case.is_refused(ChainError::Table { address, len }, 0);
    }
    // The second of its descriptors lies past the end of memory.
    let mut guest = Guest::new(SIZE, true, 0);
    let (mut ring, mut queue) = (guest.ring(), guest.queue());
    let address = NOWHERE - 16;
    guest.set_descriptor(0, Descriptor::new(address, 32, INDIRECT, 0));
    guest.write_table(address, 0, followed_by(1));
    guest.offer(0);
    assert_eq!(ring.take(), Ok(0));
    let found = ring.chain(0, &guest.memory, &mut Chain::default());
    assert_eq!(found, Err(ChainError::Table { address, len: 32 }));
    assert_eq!(queue.pop_descriptor_chain(&guest.mmap).unwrap().count(), 1);
}

#[test]
fn an_indirect_descriptor_where_none_may_be() {
    let inner = to_table(16, INDIRECT);
    Case::indirect(&[inner]).is_refused(ChainError::Nested, 0);
    Case::indirect(&[followed_by(1), inner]).is_refused(ChainError::Nested, 1);
    let behind = Case {
        descriptors: vec![to_table(16, INDIRECT | NEXT), buffer(0)],
        table: vec![Descriptor::new(0, 512, WRITE, 0)],
    };
    behind.is_refused(ChainError::Nested, 1);
}

/// A name for each, so that a new one does not compile until there is a case for it above.
fn name(error: &ChainError) -> &'static str {
    match error {
        ChainError::TooLong => "too long",
        ChainError::Next { .. } => "next",
        ChainError::Outside { .. } => "outside",
        ChainError::Order => "order",
        ChainError::Table { .. } => "table",
        ChainError::Nested => "nested",
    }
}

/// Whatever a driver writes: when we take a chain, it is the reference's, and when we do not, the error says why.
#[test]
fn arbitrary_descriptors_are_taken_as_the_reference_takes_them_or_refused() {
    let mut reached = std::collections::BTreeMap::new();
    each_seed(6, |random| {
        for _ in 0..60 {
            let size = 1 << random.random_range(0..8);
            let mut guest = Guest::new(size, true, random.random());
            let (mut ring, mut queue) = (guest.ring(), guest.queue());
            let mut rarely = |rate: u32| random.random_range(0..rate) == 0;
            let mut descriptors = Vec::new();
            for index in 0..256u16 {
                let mut flags = if rarely(3) { 0 } else { NEXT };
                flags |= if rarely(4) || index % 8 > 3 { WRITE } else { 0 };
                let indirect = rarely(6);
                let broken = rarely(50);
                descriptors.push((flags, indirect, broken));
            }
            for (index, (flags, indirect, broken)) in descriptors.into_iter().enumerate() {
                let index = index as u16;
                let next =
                    if random.random_range(0..20) == 0 { random.random_range(0..size * 2) } else { (index + 1) % 256 };
                let len = if broken { random.random() } else { random.random_range(0..2048) };
                let address = if broken { random.random() } else { random.random_range(0..TABLES.start - 2048) };
                guest.write_table(TABLES.start, index, Descriptor::new(address, len, flags, next));
                if index >= size {
                    continue;
                }
                let descriptor = if indirect {
                    let entry = random.random_range(0..256);
                    let len = 16 * random.random_range(0..20) + u32::from(broken);
                    let flags = INDIRECT | if random.random_range(0..8) == 0 { NEXT } else { 0 };
                    Descriptor::new(TABLES.start + 16 * entry, len, flags, next)
                } else {
                    Descriptor::new(address, len, flags, next % (size + 1))
                };
                guest.set_descriptor(index, descriptor);
            }
            for _ in 0..size.min(40) {
                guest.offer(random.random_range(0..size));
            }
            let expected: Vec<_> =
                queue.iter(&guest.mmap).unwrap().map(|chain| (chain.head_index(), chain.collect::<Vec<_>>())).collect();
            let mut chain = Chain::default();
            for (head, descriptors) in expected {
                assert_eq!(ring.take(), Ok(head));
                match ring.chain(head, &guest.memory, &mut chain) {
                    Ok(()) => {
                        guest.check_lengths(&chain, &descriptors);
                    }
                    Err(error) => *reached.entry(name(&error)).or_insert(0) += 1,
                }
            }
        }
    });
    println!("{reached:?}");
    assert_eq!(reached.len(), 6, "each of them is reached: {reached:?}");
}
