//! The API: HTTP/JSON on a unix socket.

pub mod types;
