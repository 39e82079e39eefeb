//! [`Transfers`]: reads and writes of a queue that the kernel carries out while the queue goes on with others.
//!
//! Each goes straight between the page cache, or the disk, and the guest's buffers: reads of what is not in memory, and writes past the page cache. A queue takes one of its
//! worker's rings ([`Rings`]) when it first has one, and keeps it until it ends. What the kernel does not move whole, for whatever reason, is for [`super::errands`], and so is
//! everything where there is no ring.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use smallvec::SmallVec;

use crate::block::cached::Patience;
use crate::block::{Batch, BegunWrite, Place, Places, Sources, Volume, VolumeFile};
use crate::sys::buffers::{Buffer, Readable, Writable};
use crate::sys::events::Epoll;
use crate::sys::guest::GuestMemory;
use crate::sys::uring::{self, FILES, RingFiles, Shape, Uring};

/// By what a backend waits for the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Io {
    /// By io_uring where the host has it and allows it, and by threads elsewhere.
    #[default]
    Auto,
    /// By io_uring, or not at all.
    Uring,
    /// By threads.
    Threads,
}

/// What is none of these.
#[derive(Debug, thiserror::Error)]
#[error("expected auto, io_uring or threads")]
pub struct IoError;

impl FromStr for Io {
    type Err = IoError;

    fn from_str(text: &str) -> Result<Io, IoError> {
        match text {
            "auto" => Ok(Io::Auto),
            "io_uring" => Ok(Io::Uring),
            "threads" => Ok(Io::Threads),
            _ => Err(IoError),
        }
    }
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Io::Auto => "auto",
            Io::Uring => "io_uring",
            Io::Threads => "threads",
        })
    }
}

impl Io {
    /// The rings of a backend that offers so many queues; to be called ahead of its sandbox. Says so where there are none to be had that nobody asked for.
    pub fn rings(self, queues: u16) -> io::Result<Option<RingFiles>> {
        if self == Io::Threads {
            return Ok(None);
        }
        match RingFiles::create(queues.clamp(1, RINGS_MAX).into()) {
            Ok(rings) => Ok(Some(rings)),
            Err(error) if self == Io::Auto => {
                log::info!("no io_uring here ({error}): threads wait for the disk");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// As many rings as a backend has at most. They are memory, and queues that never wait for the disk need none.
const RINGS_MAX: u16 = 4;

/// While the disk works and nothing else is to be done, it is told of so many reads at a time: the first of a batch need not wait for the last. While all turns out to be
/// in memory, one call is made for a batch.
const EAGER: u32 = 2;
/// While other requests wait, it is told of so many at a time: most of what that takes it takes once for all of them, and they would wait for it each time.
const TOGETHER: u32 = 4;
/// No transfer waits for more batches than this to come together with others, and for no more than as many again until those before it are collected.
const PUT_OFF_MAX: u32 = 4;

/// The rings of a worker, which its queues share out.
pub struct Rings {
    /// In use are those that somebody else has too.
    files: Mutex<Vec<Arc<OwnedFd>>>,
    shape: Shape,
}

impl Rings {
    /// Those that this process was started with.
    pub fn new(files: Vec<OwnedFd>, shape: Shape) -> Rings {
        Rings { files: Mutex::new(files.into_iter().map(Arc::new).collect()), shape }
    }

    /// Waits until the kernel is done with what earlier processes had it do.
    pub fn wait_for_last(&self) -> io::Result<()> {
        let files = self.files.lock().expect("no holder of this lock panics");
        files.iter().try_for_each(|file| uring::wait_for_last(file, &self.shape))
    }

    /// A ring that is free, for the volume's files.
    fn take(&self, volume: &Volume) -> Option<Uring> {
        let mut files = self.files.lock().expect("no holder of this lock panics");
        let position = files.iter().position(|file| Arc::strong_count(file) == 1)?;
        let of_volume: [_; FILES] =
            [VolumeFile::Base, VolumeFile::Delta].map(|file| volume.file(file).map(|file| file.as_fd()));
        match Uring::adopt(Arc::clone(&files[position]), self.shape, of_volume) {
            Ok(uring) => Some(uring),
            Err(error) => {
                log::warn!("a ring cannot be used, so that threads wait for the disk: {error}");
                files.remove(position);
                None
            }
        }
    }
}

/// A request whose bytes are to be moved.
pub struct Request<'m> {
    /// Where its chain begins.
    pub head: u16,
    /// When the queue took it.
    pub taken: Instant,
    /// Offset in the volume.
    pub offset: u64,
    /// The byte for its status.
    pub status_place: Writable<'m>,
}

/// A request that the kernel is done with.
pub struct Finished<'m> {
    pub request: Request<'m>,
    /// Bytes that were asked for.
    pub bytes: u32,
    /// Where bytes that were read came from.
    pub sources: Sources,
    /// What it is to the volume if it is a write.
    pub write: Option<BegunWrite>,
    /// Not all of it was moved.
    pub failed: bool,
}

/// The transfers of a queue.
pub struct Transfers<'m> {
    /// Where to get a ring; none: no further one.
    rings: Option<Arc<Rings>>,
    /// Ahead of what is under way: dropped, it waits for that.
    uring: Option<Uring>,
    gives_up: bool,
    under_way: Vec<Option<UnderWay<'m>>>,
    /// The places of that which are free.
    free: Vec<u32>,
    count: usize,
    /// Those that are done and that nobody has taken.
    finished: Vec<Finished<'m>>,
    /// How often transfers have been submitted.
    submissions: u32,
    /// Whether any was under way when all had been submitted.
    disk_works: bool,
    /// For how many batches those that the kernel has not been told of have waited for more of them.
    put_off: u32,
}

struct UnderWay<'m> {
    request: Finished<'m>,
    places: SmallVec<[(VolumeFile, u64, u64); 2]>,
    /// Of these, how many are not done, and the bytes of those that are.
    remaining: usize,
    done: u64,
    /// The number of the submission that it goes with.
    submission: u32,
}

impl<'m> Transfers<'m> {
    /// None yet. Without rings, there never are any.
    pub fn new(rings: Option<Arc<Rings>>) -> Transfers<'m> {
        Transfers {
            rings,
            uring: None,
            gives_up: false,
            under_way: Vec::new(),
            free: Vec::new(),
            count: 0,
            finished: Vec::new(),
            submissions: 0,
            disk_works: false,
            put_off: 0,
        }
    }

    /// How a queue should read by itself.
    #[inline]
    pub fn patience(&self) -> Patience {
        let reads = (self.uring.is_some() || self.rings.is_some()) && !self.gives_up;
        if reads { Patience::Known } else { Patience::AtOnce }
    }

    /// Begins no further ones.
    pub fn give_up(&mut self) {
        self.rings = None;
        self.gives_up = true;
    }

    /// How many have not been taken.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether there is a ring with room. `epoll` wakes who waits for the end of a transfer.
    fn has_room(&mut self, volume: &Volume, epoll: &Epoll) -> bool {
        if self.uring.is_none() {
            // Asked once: where all are taken, this queue does without.
            self.uring = self.rings.take().and_then(|rings| rings.take(volume));
            let added = self.uring.as_ref().map(|uring| epoll.add_edge(&uring.as_fd()));
            if let Some(Err(error)) = added {
                log::warn!("a ring cannot be waited for, so that threads wait for the disk: {error}");
                self.uring = None;
            }
        }
        self.uring.as_ref().is_some_and(|uring| !self.gives_up && uring.room() > 0)
    }

    /// Begins a read into `data`, which lies in `memory`. Whether it is under way; if not, somebody else has to do it. The disk
    /// may be told of it at once, unless there are `others` that need not wait for it.
    pub fn begin_read(
        &mut self,
        request: Request<'m>,
        data: &[Writable<'m>],
        volume: &Volume,
        memory: &Arc<GuestMemory>,
        epoll: &Epoll,
        others: bool,
    ) -> bool {
        if !self.has_room(volume, epoll) {
            return false;
        }
        let mut batch = Batch::default();
        // Whoever does it instead finds out what is wrong.
        let Ok(places) = volume.places(request.offset, data, &mut batch) else { return false };
        let request = Finished {
            request,
            bytes: data.iter().map(|buffer| buffer.len() as u32).sum(),
            sources: batch.take_sources(),
            write: None,
            failed: false,
        };
        let begins = self.begin(request, &places, |uring, place, number| {
            uring.read(place.file as usize, place.offset, &place.buffers, memory, number)
        });
        if begins && self.disk_works && !others && self.uring.as_ref().is_some_and(|uring| uring.unsubmitted() >= EAGER)
        {
            self.submit_all(volume);
        }
        begins
    }

    /// Begins a write of `data`, which lies in `memory`. Whether it is under way; if not, somebody else has to do it.
    pub fn begin_write(
        &mut self,
        request: Request<'m>,
        data: &[Readable<'m>],
        volume: &Arc<Volume>,
        memory: &Arc<GuestMemory>,
        epoll: &Epoll,
    ) -> bool {
        if !self.has_room(volume, epoll) {
            return false;
        }
        let Ok(Some((write, places))) = BegunWrite::new(volume, request.offset, data) else { return false };
        let request = Finished {
            request,
            bytes: data.iter().map(|buffer| buffer.len() as u32).sum(),
            sources: Sources::default(),
            write: Some(write),
            failed: false,
        };
        self.begin(request, &places, |uring, place, number| {
            uring.write(place.file as usize, place.offset, &place.buffers, memory, number)
        })
    }

    /// Has `begin_place` begin each part of a request. Whether it is under way.
    fn begin<B: Buffer>(
        &mut self,
        mut request: Finished<'m>,
        places: &Places<B>,
        mut begin_place: impl FnMut(&mut Uring, &Place<B>, u32) -> bool,
    ) -> bool {
        let Some(uring) = self.uring.as_mut().filter(|uring| uring.room() >= places.len()) else { return false };
        let number = self.free.last().copied().unwrap_or(self.under_way.len() as u32);
        let remaining = places.iter().take_while(|place| begin_place(uring, place, number)).count();
        request.failed = remaining < places.len();
        let places = places.iter().map(|place| (place.file, place.offset, place.len)).collect();
        self.count += 1;
        if remaining == 0 {
            self.finished.push(request);
            return true;
        }
        let under_way = UnderWay { request, places, remaining, done: 0, submission: self.submissions };
        match self.free.pop() {
            Some(number) => self.under_way[number as usize] = Some(under_way),
            None => self.under_way.push(Some(under_way)),
        }
        true
    }

    /// Has the kernel go on with those that were begun, now or after one of the next batches. To be called after each, and `others` says that the next one waits.
    #[inline]
    pub fn submit_soon(&mut self, volume: &Volume, others: bool) {
        let waiting = self.uring.as_ref().map_or(0, Uring::unsubmitted);
        // The kernel copies what has been read meanwhile on the way back from a call. Requests that wait would wait for that and for the submission, one behind the
        // other: so it comes by itself, ahead of the next batch.
        let has_some = self.uring.as_ref().is_some_and(Uring::has_some);
        let put_off_max = if has_some { 2 * PUT_OFF_MAX } else { PUT_OFF_MAX };
        if others && (waiting < TOGETHER || has_some) && self.put_off < put_off_max {
            self.put_off += u32::from(waiting > 0);
        } else {
            self.submit(volume);
        }
    }

    /// Has the kernel go on with all that were begun.
    #[inline]
    pub fn submit(&mut self, volume: &Volume) {
        if self.uring.as_ref().is_some_and(|uring| uring.unsubmitted() > 0) {
            self.submit_all(volume);
        }
    }

    fn submit_all(&mut self, volume: &Volume) {
        self.put_off = 0;
        let Some(uring) = &mut self.uring else { return };
        let result = uring.submit();
        if uring.unsubmitted() > 0 {
            let reason = result.err().map_or("it takes no more".to_owned(), |error| error.to_string());
            log::debug!("transfers are left to threads: {reason}");
            while let Some(tag) = self.uring.as_mut().and_then(Uring::withdraw) {
                self.end(tag, Err(io::ErrorKind::WouldBlock.into()), volume);
            }
        }
        // What is done by now was in memory.
        self.collect(volume);
        self.disk_works = self.uring.as_ref().is_some_and(|uring| uring.under_way() > 0);
        self.submissions = self.submissions.wrapping_add(1);
    }

    /// Whether one may be done.
    #[inline]
    pub fn has_some(&self) -> bool {
        !self.finished.is_empty() || self.uring.as_ref().is_some_and(Uring::has_some)
    }

    /// Moves those that are done to `to`.
    pub fn take(&mut self, volume: &Volume, to: &mut Vec<Finished<'m>>) {
        self.collect(volume);
        self.count -= self.finished.len();
        to.append(&mut self.finished);
    }

    fn collect(&mut self, volume: &Volume) {
        while let Some(ended) = self.uring.as_mut().and_then(Uring::next_ended) {
            self.end(ended.tag, ended.result, volume);
        }
    }

    /// Notes the end of a part of a transfer.
    fn end(&mut self, number: u32, result: io::Result<usize>, volume: &Volume) {
        let Some(place) = self.under_way.get_mut(number as usize) else { return };
        let Some(under_way) = place else { return };
        under_way.remaining -= 1;
        // Which part it was is not known, so the bytes of all are counted.
        under_way.request.failed |= result.is_err();
        under_way.done += result.unwrap_or(0) as u64;
        if under_way.remaining > 0 {
            return;
        }
        let Some(UnderWay { mut request, places, submission, done, .. }) = place.take() else { return };
        self.free.push(number);
        request.failed |= done != places.iter().map(|(_, _, len)| len).sum::<u64>();
        if !request.failed && request.write.is_none() {
            let found = submission == self.submissions;
            places.iter().for_each(|(file, offset, len)| volume.note_read(*file, *offset, *len, found));
        }
        self.finished.push(request);
    }

    /// Has the kernel go on with all, and waits until one is done.
    pub fn wait(&mut self, volume: &Volume) -> io::Result<()> {
        self.submit(volume);
        match &mut self.uring {
            Some(uring) if self.finished.is_empty() => uring.wait(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::base::Base;
    use crate::sys::file;
    use crate::sys::guest::RegionPlace;

    const PAGE: u64 = 4096;

    /// Transfers of the pages of an image, one after the other, and what they take.
    struct Reader<'m> {
        transfers: Transfers<'m>,
        pages: std::iter::Enumerate<std::vec::IntoIter<Writable<'m>>>,
        taken: Vec<Finished<'m>>,
        volume: &'m Volume,
        memory: &'m Arc<GuestMemory>,
        epoll: &'m Epoll,
    }

    impl Reader<'_> {
        fn begin(&mut self, count: u32) {
            let Reader { transfers, pages, volume, memory, epoll, .. } = self;
            for (number, data) in pages.take(count as usize) {
                let (offset, status_place) = (number as u64 * PAGE, data.part(0, 1));
                let request = Request { head: 0, taken: Instant::now(), offset, status_place };
                assert!(transfers.begin_read(request, &[data], volume, memory, epoll, true));
            }
        }

        /// Has the kernel read one of which nobody looks whether it has.
        fn leave_one(&mut self) {
            self.begin(1);
            self.transfers.uring.as_mut().unwrap().submit().unwrap();
            assert!(self.transfers.has_some());
        }

        fn take(&mut self) {
            self.transfers.take(self.volume, &mut self.taken);
        }

        /// How many batches are served before the kernel knows of all.
        fn batches(&mut self, others: bool) -> u32 {
            let mut batches = 0;
            while self.transfers.uring.as_ref().unwrap().unsubmitted() > 0 && batches < 100 {
                batches += 1;
                self.transfers.submit_soon(self.volume, others);
            }
            batches
        }
    }

    /// All of it is in memory, so that the kernel is done with whatever it is told of; what is counted is batches, and no time.
    #[test]
    fn reads_wait_for_company_while_others_are_served_and_for_what_is_to_be_collected_but_not_for_ever() {
        let rings = match RingFiles::create(1) {
            Ok(files) => Arc::new(Rings::new(vec![files.files()[0].try_clone().unwrap()], files.shape())),
            Err(error) => return println!("skipped: no io_uring here: {error}"),
        };
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file::write_at(&file, &[Readable::from_slice(&[7; 32 * PAGE as usize])], 0).unwrap();
            file
        };
        let volume = Volume::read_only(Base::map(&file(), "an image".to_owned()).unwrap());
        let place = RegionPlace { guest_address: 0, user_address: 0, bytes: 32 * PAGE, file_offset: 0 };
        let memory = Arc::new(GuestMemory::map(vec![(place, file())]).unwrap());
        let epoll = Epoll::new().unwrap();
        let mut buffers = Vec::new();
        assert!((0..32).all(|page| memory.writable(page * PAGE, PAGE, &mut buffers)));
        let mut reader = Reader {
            transfers: Transfers::new(Some(rings)),
            pages: buffers.into_iter().enumerate(),
            taken: Vec::new(),
            volume: &volume,
            memory: &memory,
            epoll: &epoll,
        };

        reader.begin(TOGETHER - 1);
        assert_eq!(reader.batches(true), PUT_OFF_MAX + 1, "too few for company");
        reader.take();
        reader.begin(1);
        assert_eq!(reader.batches(false), 1, "nobody else is served");
        reader.take();
        reader.begin(TOGETHER);
        assert_eq!(reader.batches(true), 1, "enough of them");
        reader.take();

        reader.leave_one();
        reader.begin(TOGETHER);
        assert_eq!(reader.batches(true), 2 * PUT_OFF_MAX + 1, "one is to be collected first");
        reader.take();
        reader.leave_one();
        reader.begin(TOGETHER);
        reader.transfers.submit_soon(&volume, true);
        reader.take();
        assert_eq!(reader.batches(true), 1, "it has been");
        reader.take();
        assert_eq!((reader.taken.len(), reader.transfers.count()), (18, 0));
        assert!(reader.taken.iter().all(|read| !read.failed));
    }
}
