//! [`Reads`]: reads of a queue that the kernel carries out while the queue goes on with others.
//!
//! Each goes straight from the page cache, or the disk, to the guest's buffers. A queue takes one of its worker's rings ([`Rings`]) when it first has such a read, and keeps it until
//! it ends. What the kernel does not read whole, for whatever reason, is for [`super::errands`], and so is everything where there is no ring.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use smallvec::SmallVec;

use crate::block::cached::Patience;
use crate::block::{Batch, Sources, Volume, VolumeFile};
use crate::sys::buffers::Writable;
use crate::sys::events::Epoll;
use crate::sys::guest::GuestMemory;
use crate::sys::uring::{FILES, RingFiles, Shape, Uring};

/// By what a backend reads what is not in memory.
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
                log::info!("no io_uring here ({error}): threads read what is not in memory");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// As many rings as a backend has at most. They are memory, and queues that never wait for the disk need none.
const RINGS_MAX: u16 = 4;

/// While the disk works, it is told of so many reads at a time: the first of a batch need not wait for the last. While all turns out to be in memory, one call is
/// made for a batch.
const EAGER: u32 = 2;

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

    /// A ring that is free, to read the volume's files by.
    fn take(&self, volume: &Volume) -> Option<Uring> {
        let mut files = self.files.lock().expect("no holder of this lock panics");
        let position = files.iter().position(|file| Arc::strong_count(file) == 1)?;
        let of_volume: [_; FILES] =
            [VolumeFile::Base, VolumeFile::Delta].map(|file| volume.file(file).map(|file| file.as_fd()));
        match Uring::adopt(Arc::clone(&files[position]), self.shape, of_volume) {
            Ok(uring) => Some(uring),
            Err(error) => {
                log::warn!("a ring for reads cannot be used, so that threads wait for the disk: {error}");
                files.remove(position);
                None
            }
        }
    }
}

/// A request to read.
pub struct ReadRequest<'m> {
    /// Where its chain begins.
    pub head: u16,
    /// When the queue took it.
    pub taken: Instant,
    /// Offset in the volume.
    pub offset: u64,
    /// The byte for its status.
    pub status_place: Writable<'m>,
}

/// A read that the kernel is done with.
pub struct Finished<'m> {
    pub request: ReadRequest<'m>,
    /// Bytes that were asked for.
    pub bytes: u32,
    /// Where they came from.
    pub sources: Sources,
    /// Not all of them were read.
    pub failed: bool,
}

/// The reads of a queue.
pub struct Reads<'m> {
    /// Where to get a ring; none: no further one.
    rings: Option<Arc<Rings>>,
    uring: Option<Uring>,
    gives_up: bool,
    under_way: Vec<Option<UnderWay<'m>>>,
    /// The places of that which are free.
    free: Vec<u32>,
    count: usize,
    /// Those that are done and that nobody has taken.
    finished: Vec<Finished<'m>>,
    /// How often reads have been submitted.
    submissions: u32,
    /// Whether any was under way when all had been submitted.
    disk_works: bool,
}

struct UnderWay<'m> {
    read: Finished<'m>,
    places: SmallVec<[(VolumeFile, u64, u64); 2]>,
    /// Of these, how many are not done, and the bytes of those that are.
    remaining: usize,
    done: u64,
    /// The number of the submission that it goes with.
    submission: u32,
}

impl<'m> Reads<'m> {
    /// None yet. Without rings, there never are any.
    pub fn new(rings: Option<Arc<Rings>>) -> Reads<'m> {
        Reads {
            rings,
            uring: None,
            gives_up: false,
            under_way: Vec::new(),
            free: Vec::new(),
            count: 0,
            finished: Vec::new(),
            submissions: 0,
            disk_works: false,
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

    /// Begins a read into `data`, which lies in `memory`. Whether it is under way; if not, somebody else has to do it. `epoll` wakes who waits for its end. The disk
    /// may be told of it at once, unless the batch `has_others` that are to be shown before that.
    pub fn begin(
        &mut self,
        request: ReadRequest<'m>,
        data: &[Writable<'m>],
        volume: &Volume,
        memory: &Arc<GuestMemory>,
        epoll: &Epoll,
        has_others: bool,
    ) -> bool {
        if self.uring.is_none() {
            // Asked once: where all are taken, this queue does without.
            self.uring = self.rings.take().and_then(|rings| rings.take(volume));
            let added = self.uring.as_ref().map(|uring| epoll.add_edge(&uring.as_fd()));
            if let Some(Err(error)) = added {
                log::warn!("a ring for reads cannot be waited for, so that threads wait for the disk: {error}");
                self.uring = None;
            }
        }
        let Some(uring) = self.uring.as_mut().filter(|_| !self.gives_up) else { return false };
        let mut batch = Batch::default();
        // Whoever does it instead finds out what is wrong.
        let Ok(places) = volume.places(request.offset, data, &mut batch) else { return false };
        if uring.room() < places.len() {
            return false;
        }
        let number = self.free.last().copied().unwrap_or(self.under_way.len() as u32);
        let mut failed = false;
        let mut remaining = 0;
        for place in &places {
            if !uring.read(place.file as usize, place.offset, &place.into, memory, number) {
                failed = true;
                break;
            }
            remaining += 1;
        }
        let bytes = data.iter().map(|buffer| buffer.len() as u32).sum();
        let read = Finished { request, bytes, sources: batch.take_sources(), failed };
        let places = places.iter().map(|place| (place.file, place.offset, place.len)).collect();
        self.count += 1;
        if remaining == 0 {
            self.finished.push(read);
            return true;
        }
        let under_way = UnderWay { read, places, remaining, done: 0, submission: self.submissions };
        match self.free.pop() {
            Some(number) => self.under_way[number as usize] = Some(under_way),
            None => self.under_way.push(Some(under_way)),
        }
        if self.disk_works && !has_others && self.uring.as_ref().is_some_and(|uring| uring.unsubmitted() >= EAGER) {
            self.submit_all(volume);
        }
        true
    }

    /// Has the kernel go on with all that were begun.
    #[inline]
    pub fn submit(&mut self, volume: &Volume) {
        if self.uring.as_ref().is_some_and(|uring| uring.unsubmitted() > 0) {
            self.submit_all(volume);
        }
    }

    fn submit_all(&mut self, volume: &Volume) {
        let Some(uring) = &mut self.uring else { return };
        let result = uring.submit();
        if uring.unsubmitted() > 0 {
            let reason = result.err().map_or("it takes no more".to_owned(), |error| error.to_string());
            log::debug!("reads are left to threads: {reason}");
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
        while let Some(read) = self.uring.as_mut().and_then(Uring::next_ended) {
            self.end(read.tag, read.result, volume);
        }
    }

    /// Notes the end of a part of a read.
    fn end(&mut self, number: u32, result: io::Result<usize>, volume: &Volume) {
        let Some(place) = self.under_way.get_mut(number as usize) else { return };
        let Some(under_way) = place else { return };
        under_way.remaining -= 1;
        // Which part it was is not known, so the bytes of all are counted.
        under_way.read.failed |= result.is_err();
        under_way.done += result.unwrap_or(0) as u64;
        if under_way.remaining > 0 {
            return;
        }
        let Some(UnderWay { mut read, places, submission, done, .. }) = place.take() else { return };
        self.free.push(number);
        read.failed |= done != places.iter().map(|(_, _, len)| len).sum::<u64>();
        if !read.failed {
            let found = submission == self.submissions;
            places.iter().for_each(|(file, offset, len)| volume.note_read(*file, *offset, *len, found));
        }
        self.finished.push(read);
    }

    /// Waits until one is done.
    pub fn wait(&mut self) -> io::Result<()> {
        match &mut self.uring {
            Some(uring) if self.finished.is_empty() => uring.wait(),
            _ => Ok(()),
        }
    }
}
