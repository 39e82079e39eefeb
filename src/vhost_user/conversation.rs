//! [`Conversation`]: messages with descriptors between two processes of one host, each whole or not at all.
//!
//! Knows nothing of what is said: [`super::order`] is what keeper and worker say, [`super::control`] what a keeper and who started it do.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::sys::socket::PacketSocket;

/// Tells when the two processes are of different builds.
const VERSION: u32 = 1;

/// Bytes in a message. Far above the largest, which has a region for every descriptor.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Why the two do not understand each other.
#[derive(Debug, thiserror::Error)]
pub enum ConversationError {
    /// The socket failed.
    #[error("the socket between the two processes failed")]
    Socket(#[source] io::Error),
    /// The other process is gone.
    #[error("the {0} is gone")]
    Gone(&'static str),
    /// Bytes that are no message.
    #[error("a message between the two processes cannot be read")]
    Decode(#[source] postcard::Error),
    /// Of another build.
    #[error(
        "a message between the two processes has version {found}, expected {VERSION}: they are of different builds"
    )]
    Version { found: u32 },
    /// Descriptors missing or left over.
    #[error("a message between the two processes came with {found} descriptors too {direction}")]
    Descriptors { found: usize, direction: &'static str },
}

/// The descriptors of a message, to be taken in the order in which they were put.
pub struct Descriptors(VecDeque<OwnedFd>);

impl Descriptors {
    /// How many are left.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next one.
    pub fn take(&mut self) -> Result<OwnedFd, ConversationError> {
        self.0.pop_front().ok_or(ConversationError::Descriptors { found: 1, direction: "few" })
    }

    /// The next one, if `wanted`.
    pub fn take_if(&mut self, wanted: bool) -> Result<Option<OwnedFd>, ConversationError> {
        if wanted { self.take().map(Some) } else { Ok(None) }
    }

    /// Sees that all have been taken.
    pub fn finish(self) -> Result<(), ConversationError> {
        match self.0.len() {
            0 => Ok(()),
            found => Err(ConversationError::Descriptors { found, direction: "many" }),
        }
    }
}

/// One end of the conversation.
pub struct Conversation {
    socket: Arc<PacketSocket>,
    /// Who is at the other end.
    peer: &'static str,
}

impl Conversation {
    /// Both ends: ours with `peer` at the other one, and what that one gets.
    pub fn with(peer: &'static str) -> io::Result<(Conversation, OwnedFd)> {
        let (ours, theirs) = PacketSocket::pair()?;
        Ok((Conversation::over(ours, peer), theirs.into()))
    }

    /// An end with `peer` at the other one.
    pub fn over(socket: PacketSocket, peer: &'static str) -> Conversation {
        Conversation { socket: Arc::new(socket), peer }
    }

    /// The same end once more.
    pub fn try_clone(&self) -> io::Result<Conversation> {
        Ok(Conversation::over(self.socket.as_fd().try_clone_to_owned()?.into(), self.peer))
    }

    /// The socket, for whoever waits for something to be said.
    pub fn socket(&self) -> Arc<PacketSocket> {
        Arc::clone(&self.socket)
    }

    /// Says something.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<(), ConversationError> {
        let bytes = postcard::to_stdvec(&(VERSION, message)).map_err(ConversationError::Decode)?;
        let descriptors: Vec<RawFd> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
        self.socket.send(&bytes, &descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ConversationError::Gone(self.peer),
            _ => ConversationError::Socket(error),
        })
    }

    /// Whether nothing of this end waits: a message that does not fit, or is not there yet, is then an error of kind `WouldBlock`.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.socket.set_nonblocking(on)
    }

    /// Waits for what the other says.
    pub fn receive<M: for<'de> Deserialize<'de>>(&self) -> Result<(M, Descriptors), ConversationError> {
        let packet = match self.socket.receive(MESSAGE_BYTES_MAX) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(ConversationError::Gone(self.peer)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ConversationError::Gone(self.peer));
            }
            Err(error) => return Err(ConversationError::Socket(error)),
        };
        // The version first: what follows may be laid out in another way.
        let (version, rest): (u32, _) = postcard::take_from_bytes(&packet.bytes).map_err(ConversationError::Decode)?;
        if version != VERSION {
            return Err(ConversationError::Version { found: version });
        }
        let message = postcard::from_bytes(rest).map_err(ConversationError::Decode)?;
        Ok((message, Descriptors(packet.descriptors.into())))
    }
}

impl ConversationError {
    /// Whether there was only nothing to receive, or no room to send.
    pub fn would_block(&self) -> bool {
        matches!(self, ConversationError::Socket(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::order::Order;
    use super::*;

    fn ends() -> (Conversation, Conversation) {
        let (keeper, worker) = Conversation::with("worker").unwrap();
        (keeper, Conversation::over(worker.into(), "keeper"))
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (keeper, worker) = ends();
        for bytes in [&[1u8, 200, 3][..], &[99, 2], &[0xff; 40]] {
            keeper.socket.send(bytes, &[]).unwrap();
            assert!(worker.receive::<Order>().is_err());
        }
        keeper.socket.send(&vec![0; MESSAGE_BYTES_MAX + 100], &[]).unwrap();
        assert!(matches!(worker.receive::<Order>(), Err(ConversationError::Socket(_))));
        drop(keeper);
        assert!(matches!(worker.receive::<Order>(), Err(ConversationError::Gone("keeper"))));
    }
}
