//! A thread that has descriptors of its own: none of the others', which have none of its.
//!
//! A process that is started begins with a copy of every descriptor of whoever starts it, if only to close them one by one. What is
//! started from such a thread begins with the few that this one has.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::channel;
use std::thread;

use super::socket::PacketSocket;

/// Starts `work` on such a thread, and gives the other end of the socket that it is called with. All descriptors that it ever has are the
/// first three, this socket, what comes by it, and what it opens by itself. All signals are held
/// back from it, and from programs that it starts until they say otherwise.
pub fn start(name: &str, work: fn(PacketSocket)) -> io::Result<PacketSocket> {
    let (ours, theirs) = PacketSocket::pair()?;
    let number = theirs.as_fd().as_raw_fd();
    let (say, said) = channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || match part(number) {
        Ok(socket) => {
            // Whoever starts this thread waits for it.
            let _ = say.send(Ok(()));
            work(socket);
        }
        Err(error) => _ = say.send(Err(error)),
    })?;
    said.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
    // Here it has one owner, and there another.
    drop(theirs);
    Ok(ours)
}

/// Parts the calling thread from the descriptors of all others, and gives it its own copy of one of them, a socket.
///
/// To be called first thing in a thread, which owns no descriptor yet; whoever owns the socket keeps it until this returns.
fn part(number: RawFd) -> io::Result<PacketSocket> {
    let number = u32::try_from(number).map_err(io::Error::other)?;
    // What handles a signal may write to a descriptor by its number, which means nothing here, or another one.
    // SAFETY: all-zero bytes are a valid signal set, and the calls only fill it and read it.
    let blocked = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let close = |first, last, flags| {
        // SAFETY: the thread has a table of its own from the first call on, or the call has failed, and nothing in it is owned yet.
        match unsafe { libc::close_range(first, last, flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // What is not to be in the new table is not copied, either.
    close(number + 1, u32::MAX, libc::CLOSE_RANGE_UNSHARE.cast_signed())?;
    if number > 3 {
        close(3, number - 1, 0)?;
    }
    // SAFETY: it was open when the table was copied, by this function's condition, and nothing else in this thread owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number.cast_signed()) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    /// Says how many descriptors it has, whenever it is asked.
    fn count(socket: PacketSocket) {
        while let Ok(Some(_)) = socket.receive(1) {
            let count = fs::read_dir("/proc/thread-self/fd").unwrap().count();
            socket.send(&[count.try_into().unwrap()], &[]).unwrap();
        }
    }

    #[test]
    fn it_has_nothing_that_others_open_before_or_afterwards() {
        let open = || (0..50).map(|_| File::open("/dev/null").unwrap()).collect::<Vec<_>>();
        let before = open();
        let apart = start("apart", count).unwrap();
        let ask = || {
            apart.send(&[0], &[]).unwrap();
            apart.receive(1).unwrap().unwrap().bytes[0]
        };
        // The first three, the socket, and the directory that is read.
        assert!(ask() <= 5);
        let after = open();
        assert!(ask() <= 5);
        // And the others still have theirs.
        assert!(before.iter().chain(&after).all(|file| file.metadata().is_ok()));
    }
}
