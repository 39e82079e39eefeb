//! Sockets that carry descriptors: the packet socket between keeper and worker, and looks at a front end's stream.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// As many descriptors as one packet may carry (the kernel's `SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 253;

/// One end of a connected socket that keeps packets apart, and tells when the other end is gone.
pub struct PacketSocket {
    // The standard library has no type for SOCK_SEQPACKET; a datagram socket has the same calls.
    socket: UnixDatagram,
}

/// A packet as received.
pub struct Packet {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The descriptors, closed on exec.
    pub descriptors: Vec<OwnedFd>,
}

impl PacketSocket {
    /// Two connected ends, both closed on exec.
    pub fn pair() -> io::Result<(PacketSocket, PacketSocket)> {
        let mut ends = [-1; 2];
        // SAFETY: `ends` has room for the two descriptors that the call writes.
        if unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) }
            != 0
        {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so both are open descriptors that nobody else owns.
        let [one, other] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        Ok((PacketSocket::from(one), PacketSocket::from(other)))
    }

    /// Sends one packet.
    pub fn send(&self, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
        match self.socket.send_with_fds(&[bytes], descriptors) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a packet of at most `bytes_max` bytes; `None` when the other end is closed.
    pub fn receive(&self, bytes_max: usize) -> io::Result<Option<Packet>> {
        // One byte more, to see that a packet was longer.
        let mut bytes = vec![0; bytes_max + 1];
        let mut raw = [-1; DESCRIPTORS_MAX];
        let (len, count) = loop {
            let mut buffer = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
            // SAFETY: the one buffer is ours and as long as it says.
            match unsafe { self.socket.recv_with_fds(&mut buffer, &mut raw) } {
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other?,
            }
        };
        // SAFETY: the kernel has just made these for us, and nobody else owns them.
        let descriptors: Vec<OwnedFd> = raw[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
        for descriptor in &descriptors {
            set_close_on_exec(descriptor)?;
        }
        if len == 0 {
            return Ok(None);
        }
        if len > bytes_max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a packet of more than {bytes_max} bytes")));
        }
        bytes.truncate(len);
        Ok(Some(Packet { bytes, descriptors }))
    }
}

impl PacketSocket {
    /// Connects to a listener at a path.
    pub fn connect(path: &Path) -> io::Result<PacketSocket> {
        let socket = new_packet_socket(0)?;
        let (address, len) = address_of(path)?;
        loop {
            // SAFETY: `address` is ours and at least as long as `len` says.
            if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } == 0 {
                return Ok(socket.into());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Whether nothing waits: what cannot be done at once is then an error of kind `WouldBlock`.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.socket.set_nonblocking(on)
    }
}

/// A socket that packet sockets connect to by its path. The file at the path stays when it is closed.
pub struct PacketListener {
    socket: OwnedFd,
}

impl PacketListener {
    /// Binds a path at which there is nothing, and listens.
    pub fn bind(path: &Path) -> io::Result<PacketListener> {
        const WAITING_MAX: i32 = 16;
        let socket = new_packet_socket(libc::SOCK_NONBLOCK)?;
        let (address, len) = address_of(path)?;
        // SAFETY: `address` is ours and at least as long as `len` says; the second call takes no pointers.
        let failed = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) != 0
                || libc::listen(socket.as_raw_fd(), WAITING_MAX) != 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(PacketListener { socket }) }
    }

    /// Takes the next connection; an error of kind `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<PacketSocket> {
        let null = std::ptr::null_mut();
        // SAFETY: the address is not asked for.
        let found = unsafe {
            libc::accept4(self.socket.as_raw_fd(), null, std::ptr::null_mut(), libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)
        };
        if found < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(found) }.into())
    }
}

impl From<OwnedFd> for PacketListener {
    fn from(socket: OwnedFd) -> PacketListener {
        PacketListener { socket }
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn new_packet_socket(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | flags, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it is an open descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// A path as a socket's address, and how long that is.
fn address_of(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all-zero bytes are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_encoded_bytes();
    // One byte more stays zero, and ends it.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path that no socket can have"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

impl From<OwnedFd> for PacketSocket {
    fn from(descriptor: OwnedFd) -> PacketSocket {
        PacketSocket { socket: descriptor.into() }
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> OwnedFd {
        socket.socket.into()
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sees to it that a program executed later does not get this descriptor.
pub fn set_close_on_exec(descriptor: &impl AsFd) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::fcntl(descriptor.as_fd().as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes over a descriptor that this process was started with, and sees to it that a program executed later does not get it.
///
/// # Errors
/// When no descriptor with that number is open, or the number belongs to standard input, output or error.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers, and fails when the descriptor is not open.
    if number <= libc::STDERR_FILENO || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: open, and named on the command line for us to own; the callers take each number once, before anything
    // else is opened.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts another socket in the place of this one, under the same descriptor.
pub fn replace(descriptor: RawFd, other: &impl AsFd) -> io::Result<()> {
    // SAFETY: takes no pointers. What owns the number goes on owning what is open there.
    if unsafe { libc::dup2(other.as_fd().as_raw_fd(), descriptor) } < 0 {
        return Err(io::Error::last_os_error());
    }
    super::process::keep_on_exec(descriptor, false)
}

/// What kind of socket a descriptor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketKind {
    /// Connections are to be accepted from it.
    Listening,
    /// It is a connection.
    Connected,
}

/// Tells a listening stream socket from a connected one; an error when it is neither.
pub fn socket_kind(descriptor: &impl AsFd) -> io::Result<SocketKind> {
    if option(descriptor, libc::SO_TYPE)? != libc::SOCK_STREAM {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a stream socket"));
    }
    Ok(if option(descriptor, libc::SO_ACCEPTCONN)? != 0 { SocketKind::Listening } else { SocketKind::Connected })
}

fn option(descriptor: &impl AsFd, name: i32) -> io::Result<i32> {
    let mut value = 0;
    let mut len = size_of::<i32>() as libc::socklen_t;
    let fd = descriptor.as_fd().as_raw_fd();
    // SAFETY: `value` and `len` are ours and describe each other.
    match unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) } {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Copies up to `to.len()` bytes that wait in a stream, without taking them, and says how many; 0 at its end.
/// Never waits: when nothing is there yet, the error is of kind `WouldBlock`.
pub fn peek(stream: &impl AsFd, to: &mut [u8]) -> io::Result<usize> {
    let fd = stream.as_fd().as_raw_fd();
    // SAFETY: `to` is ours and as long as we say.
    let len = unsafe { libc::recv(fd, to.as_mut_ptr().cast(), to.len(), libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Copies of the descriptors that the next `bytes` bytes in a stream come with, at most `max`, and whether there are more. Takes nothing.
pub fn peek_descriptors(stream: &impl AsFd, bytes: usize, max: usize) -> io::Result<(Vec<OwnedFd>, bool)> {
    let mut data = vec![0u8; bytes];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: a computation.
    let space = unsafe { libc::CMSG_SPACE((max * size_of::<RawFd>()) as u32) } as usize;
    // Of numbers that are aligned as a control message has to be.
    let mut control = vec![0u64; space.div_ceil(size_of::<u64>())];
    // SAFETY: all-zero bytes are a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // Exactly as much as `max` descriptors take: what does not fit, the kernel says so.
    // SAFETY: a computation.
    message.msg_controllen = unsafe { libc::CMSG_LEN((max * size_of::<RawFd>()) as u32) } as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: all parts of the message are ours and as long as it says.
    if unsafe { libc::recvmsg(stream.as_fd().as_raw_fd(), &raw mut message, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    // SAFETY: the kernel has filled the control buffer, and says in the message how far.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: a whole header within the control buffer, by the macros' promise.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len as usize) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: a computation.
            let count = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel has just put that many descriptors there, for us, and nobody else owns them.
                found.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().add(index).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((found, message.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Sends bytes to a stream if there is room for all of them at once.
pub fn send_at_once(stream: &impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is as long as we say.
    let sent = unsafe { libc::send(stream.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    match usize::try_from(sent) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Whether some kilobytes can be written to a stream without waiting for the other side to read.
pub fn is_writable(stream: &impl AsFd) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: stream.as_fd().as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one entry, ours.
    match unsafe { libc::poll(&raw mut polled, 1, 0) } {
        count if count >= 0 => Ok(polled.revents != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many bytes wait in a stream.
pub fn bytes_waiting(stream: &impl AsFd) -> io::Result<usize> {
    let mut count: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    match unsafe { libc::ioctl(stream.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) } {
        0 => Ok(count.max(0) as usize),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the other side of a stream is gone; what it sent before may still wait.
pub fn is_peer_gone(stream: &impl AsFd) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: stream.as_fd().as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one entry, ours.
    match unsafe { libc::poll(&raw mut polled, 1, 0) } {
        count if count >= 0 => Ok(polled.revents != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until one of the descriptors can be read or is at its end, at most `timeout_ms` (-1: without limit), and says which.
/// What is `None` is not waited for.
pub fn wait_readable<const N: usize>(
    descriptors: [Option<BorrowedFd<'_>>; N],
    timeout_ms: i32,
) -> io::Result<[bool; N]> {
    let mut polled = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; N];
    // One after the other: the kernel refuses more entries than a process may have descriptors, whatever is in them.
    let mut count = 0;
    for descriptor in descriptors.iter().flatten() {
        polled[count].fd = descriptor.as_raw_fd();
        count += 1;
    }
    loop {
        // SAFETY: `polled` is ours and has N entries, and no more than those were counted.
        if unsafe { libc::poll(polled.as_mut_ptr(), count as libc::nfds_t, timeout_ms) } >= 0 {
            let mut entries = polled.iter();
            let mut is_ready = |_| entries.next().is_some_and(|entry| entry.revents != 0);
            return Ok(descriptors.map(|descriptor| descriptor.is_some_and(&mut is_ready)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Who is at the other end of a unix socket.
pub struct Peer {
    /// The user that it was when it connected.
    pub uid: u32,
    /// Its groups, the primary one first.
    pub gids: Vec<u32>,
    /// The process that connected.
    pub process: u32,
}

/// Says who is at the other end of a connected unix socket, as the kernel noted it when the connection was made.
pub fn peer(stream: &impl AsFd) -> io::Result<Peer> {
    let fd = stream.as_fd().as_raw_fd();
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `found` and `len` are ours and describe each other.
    if unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut found).cast(), &raw mut len) } != 0
    {
        return Err(io::Error::last_os_error());
    }
    // Mostly enough; else the kernel says how many there are.
    let mut groups = vec![0 as libc::gid_t; 64];
    let mut len = size_of_val(groups.as_slice()) as libc::socklen_t;
    loop {
        // SAFETY: `groups` and `len` are ours and describe each other.
        let result = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len)
        };
        match io::Error::last_os_error() {
            _ if result == 0 => break,
            error if error.raw_os_error() == Some(libc::ERANGE) && len as usize > size_of_val(groups.as_slice()) => {
                groups.resize(len as usize / size_of::<libc::gid_t>(), 0);
            }
            error => return Err(error),
        }
    }
    groups.truncate(len as usize / size_of::<libc::gid_t>());
    groups.retain(|group| *group != found.gid);
    groups.insert(0, found.gid);
    Ok(Peer { uid: found.uid, gids: groups, process: found.pid.unsigned_abs() })
}
