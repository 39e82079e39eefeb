//! Pando: many virtual machines from one read-only operating-system image.
//!
//! A backend serves one **volume** to one virtual machine over vhost-user-blk. Reads come from the **base**, an image
//! that all backends of a host map read-only and so pay for once; writes go to the machine's own **delta**, a sparse
//! file. Two processes make up a backend: the **keeper** speaks with the front end, the **worker** moves the bytes. A
//! **daemon** manages the images, volumes and backends of a host, and may come and go while virtual machines run.
//!
//! # Layers
//!
//! ```text
//! bin/pando ──▶ cli ──▶ daemon ──┬──▶ store ───────┐
//!                                ▼                 ▼
//! bin/pando-blk ──────────▶ vhost_user ──▶ block ──▶ digest, sys, units
//! ```
//!
//! | module | owns | knows nothing of |
//! |---|---|---|
//! | [`units`] | sectors, clusters, byte counts | everything else; a leaf |
//! | [`digest`] | the names of images: BLAKE3 of their contents | what an image is used for |
//! | [`sys`] | mappings, guarded copies, file verbs, sockets, processes, sandboxes; all `unsafe` | what the bytes mean |
//! | [`block`] | one volume: base, delta, their union | virtio, sockets |
//! | [`store`] | images at rest: their files, imported, verified | running machines, volumes |
//! | [`vhost_user`] | one guest's device: session, rings, requests | what is behind a volume |
//! | [`daemon`] | one host: what there is, who has it, who may, and the backends' lives | command lines; it is never on the data path |
//! | [`cli`] | arguments, a call, text | how anything is done |
//!
//! # The life of a guest's write
//!
//! 1. The driver puts a chain of descriptors into its ring and kicks. The queue's thread ([`vhost_user::queue`]) wakes
//!    from `epoll`, reads the available index once, and takes a batch.
//! 2. [`vhost_user::ring`] copies each descriptor, checks it, and turns guest addresses into buffers;
//!    [`vhost_user::request`] reads the header from them, once, and checks it.
//! 3. [`block::Volume`] looks up the clusters. Are they all in the delta, the bytes go to the file with one `pwritev`, straight
//!    from guest memory. If not, it takes the exclusion of their stretch, and the `pwritev` writes whole clusters: the guest's bytes
//!    between those of the base. Then it marks the clusters, in memory.
//!    Writes of a batch that follow on each other go there together ([`block::writes`]).
//! 4. After the batch, [`block::delta::Delta::commit`] appends the new marks to the mark log in the file, with one write.
//!    The page cache now holds data and mark: no death of this process can lose them.
//! 5. The queue writes the statuses and the used entries, publishes them with one store of the used index, and notifies the driver once, if it
//!    wants that.
//! 6. The driver's flush makes it durable: sync, copy the marks into the cluster map on disk, sync.
//!
//! A read is a copy from a mapping where the pages are known to be in memory ([`block::cached`]). Others the kernel carries out while the queue goes on
//! ([`vhost_user::transfers`], by io_uring). Where that cannot be had, and for a flush that has something to sync, there are threads of the worker that
//! may wait ([`vhost_user::errands`]). So no queue does; what is done comes back to the queue, which completes it.
//!
//! A delta whose data goes past the page cache ([`block::DeltaCache::Direct`]) has reads and writes of its clusters carried out in those two ways alone. What is
//! written whole is marked when it has arrived ([`block::BegunWrite`]); a write that leaves part of a new cluster to be filled in is for a thread. Marks and maps
//! go through the page cache as ever.
//!
//! # Invariants
//!
//! - A base is never written. A delta is bound to the digest of its base, and refuses any other.
//! - A cluster is marked on disk only after its data is durable there; it is logged before its write completes.
//! - Memory that others can change (the guest's, the front end's) is copied, then checked, then used; never checked in place.
//! - A page that cannot be had, of a file or of guest memory, fails the request that needs it, or ends the ring; the process lives.
//! - What a guest or a front end says is read in a sandbox ([`vhost_user::sandbox`]), which is closed before the first word.
//! - Nothing that a guest, a front end or a file says can make a process panic, or grow without a limit.

#![deny(unsafe_code)]

pub mod block;
#[cfg(feature = "cli")]
pub mod cli;
pub mod daemon;
pub mod digest;
pub mod store;
pub mod sys;
pub mod units;
pub mod vhost_user;
