//! [`Survey::extents`]: where each byte of a volume lies, as few ranges as there are.

use super::OpenError;
use super::map::State;
use super::survey::{Run, Survey};

/// A range of the volume whose bytes lie together in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the volume, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where.
    pub place: Place,
}

/// Where bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the delta, at this offset of its file.
    Delta { offset: u64 },
    /// In the base, at the same offset as in the volume.
    Base,
    /// Nowhere: zeros by a mark.
    Zero,
    /// Nowhere: zeros because neither the base nor the delta has them.
    Absent,
}

impl Extent {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether `next`, which starts where this ends, goes on in the same place.
    fn continues(&self, next: &Extent) -> bool {
        match (self.place, next.place) {
            (Place::Delta { offset }, Place::Delta { offset: next }) => offset + self.len == next,
            (place, next) => place == next,
        }
    }
}

impl Survey {
    /// Gives every extent of the volume to `each`, in order; together they are all of it.
    ///
    /// A corrupt sector of the map is an error, after the extents ahead of it.
    pub fn extents<E: From<OpenError>>(&self, each: impl FnMut(Extent) -> Result<(), E>) -> Result<(), E> {
        let layout = self.layout();
        let (cluster, virtual_bytes) = (layout.cluster(), layout.virtual_bytes());
        let mut joiner =
            Joiner { at: 0, base_bytes: self.header().base.map_or(0, |base| base.bytes), pending: None, each };
        for group in self.groups() {
            let group = group?;
            for run in group.runs() {
                let Run { first, count, state } = run;
                let (start, end) = (cluster.start_of(first), cluster.start_of(first + count).min(virtual_bytes));
                let place = match state {
                    Some(State::Base) => continue,
                    Some(State::Delta | State::Fresh) => Place::Delta { offset: layout.data(first) },
                    Some(State::Zero) => Place::Zero,
                    None => match self.corrupt(&group, run) {
                        Some(error) => return Err(error.into()),
                        None => continue,
                    },
                };
                joiner.base_up_to(start)?;
                joiner.push(end, place)?;
            }
        }
        joiner.base_up_to(virtual_bytes)?;
        joiner.finish()
    }
}

/// Joins neighbours and hands on what has no more of them.
struct Joiner<F> {
    /// Up to where there are extents.
    at: u64,
    base_bytes: u64,
    pending: Option<Extent>,
    each: F,
}

impl<E, F: FnMut(Extent) -> Result<(), E>> Joiner<F> {
    /// Adds what no mark speaks of.
    fn base_up_to(&mut self, end: u64) -> Result<(), E> {
        self.push(end.min(self.base_bytes), Place::Base)?;
        self.push(end, Place::Absent)
    }

    fn push(&mut self, end: u64, place: Place) -> Result<(), E> {
        if end <= self.at {
            return Ok(());
        }
        let next = Extent { start: self.at, len: end - self.at, place };
        self.at = end;
        match &mut self.pending {
            Some(pending) if pending.continues(&next) => pending.len = next.end() - pending.start,
            pending => {
                if let Some(done) = pending.replace(next) {
                    (self.each)(done)?;
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), E> {
        self.pending.take().map_or(Ok(()), &mut self.each)
    }
}
