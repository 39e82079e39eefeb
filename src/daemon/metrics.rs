//! What is going on, in numbers: Prometheus' text, and the loads that `pando top` shows.
//!
//! The numbers are read where they lie: backends count in memory that the daemon maps, deltas are asked for their size, images for
//! their pages in the page cache. Nothing is asked of a backend.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;

use crate::sys::file;
use crate::vhost_user::counters::{BUCKETS, Kind, Snapshot, bucket_limit_ns};

use super::Host;
use super::access::{Call, Caller, Object};
use super::api::types::{Load, Verb};
use super::catalog::{AttachmentRow, DeltaState};
use super::error::Error;

/// A page of text in Prometheus' format.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    /// Begins a metric: what follows are its samples.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let braces = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{name}{braces} {value}");
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

impl Host {
    /// All attachments with what their backends have counted and what their deltas take.
    fn counted(&self) -> Result<Vec<(AttachmentRow, Snapshot, u64)>, Error> {
        let snapshots: BTreeMap<i64, Snapshot> = self.backends.snapshots().into_iter().collect();
        let rows = self.catalog.read(|facts| {
            let rows = facts.attachments()?.into_iter();
            rows.map(|row| Ok::<_, Error>((facts.delta(&row.volume, DeltaState::Current)?, row)))
                .collect::<Result<Vec<_>, _>>()
        })?;
        let with = |(delta, row): (Option<_>, AttachmentRow)| {
            let snapshot = snapshots.get(&row.id).copied().unwrap_or_default();
            (row, snapshot, delta.map_or(0, |delta| self.delta_bytes(&delta)))
        };
        Ok(rows.into_iter().map(with).collect())
    }

    /// How much each attached volume that the caller may see has done.
    pub fn load(&self, caller: &Caller) -> Result<Vec<Load>, Error> {
        let visible = Call::look(self, caller, "volume.load", "volume:*", |call| {
            self.catalog.read(|facts| {
                call.require_any(facts, "volume")?;
                let mut visible = Vec::new();
                for row in facts.attachments()? {
                    if call.may(facts, Verb::Use, &Object::Volume(row.volume.clone()))? {
                        visible.push(row.id);
                    }
                }
                Ok(visible)
            })
        })?;
        let counted = self.counted()?.into_iter().filter(|(row, ..)| visible.contains(&row.id));
        let load = |(row, snapshot, delta_bytes): (AttachmentRow, Snapshot, u64)| {
            let sum = |kinds: &[Kind], of: fn(&crate::vhost_user::counters::OfKind) -> u64| {
                kinds.iter().map(|kind| of(snapshot.of(*kind))).fold(0, u64::wrapping_add)
            };
            let changes = [Kind::Write, Kind::Discard, Kind::WriteZeroes];
            Load {
                volume: row.volume,
                vm: row.vm,
                reads: sum(&[Kind::Read], |of| of.requests),
                writes: sum(&changes, |of| of.requests),
                flushes: sum(&[Kind::Flush], |of| of.requests),
                read_bytes: sum(&[Kind::Read], |of| of.bytes),
                written_bytes: sum(&[Kind::Write], |of| of.bytes),
                errors: sum(&Kind::ALL, |of| of.failed),
                latency_ns: sum(&Kind::ALL, |of| of.ns),
                delta_bytes,
            }
        };
        Ok(counted.map(load).collect())
    }

    /// Everything, in Prometheus' text format.
    pub fn metrics(&self) -> Result<String, Error> {
        let mut page = Page::default();
        let counted = self.counted()?;
        self.volume_metrics(&mut page, &counted);
        self.image_metrics(&mut page)?;
        let status = self.status()?;
        page.metric("pando_jobs_running", "gauge", "Jobs at work.");
        page.sample("pando_jobs_running", &[], status.jobs_running);
        page.metric("pando_volumes", "gauge", "Volumes.");
        page.sample("pando_volumes", &[], status.volumes);
        page.metric("pando_volumes_behind", "gauge", "Volumes that are not on the image that they are to be on.");
        page.sample("pando_volumes_behind", &[], status.volumes_behind);
        page.metric("pando_daemon_starts_total", "counter", "Starts of the daemon on its state directory.");
        page.sample("pando_daemon_starts_total", &[], status.starts);
        page.metric("pando_daemon_started_seconds", "gauge", "When the daemon was started, in seconds since 1970.");
        page.sample("pando_daemon_started_seconds", &[], status.started_at);
        page.metric("pando_daemon_memory_bytes", "gauge", "The daemon's own private memory.");
        page.sample("pando_daemon_memory_bytes", &[], status.memory_bytes);
        page.metric("pando_connections_refused_total", "counter", "Connections of the API that were too many.");
        page.sample("pando_connections_refused_total", &[], self.connections_refused.load(Ordering::Relaxed));
        Ok(page.text)
    }

    fn volume_metrics(&self, page: &mut Page, counted: &[(AttachmentRow, Snapshot, u64)]) {
        let mut by_kind = |name: &str, help: &str, of: fn(&crate::vhost_user::counters::OfKind) -> u64| {
            page.metric(name, "counter", help);
            for (row, snapshot, _) in counted {
                for kind in Kind::ALL {
                    let labels = [("volume", row.volume.as_str()), ("vm", row.vm.as_str()), ("type", kind.name())];
                    page.sample(name, &labels, of(snapshot.of(kind)));
                }
            }
        };
        by_kind("pando_volume_requests_total", "Requests of a volume's guest.", |of| of.requests);
        by_kind("pando_volume_bytes_total", "Bytes that these requests were about.", |of| of.bytes);
        by_kind("pando_volume_errors_total", "Requests that were answered with an error.", |of| of.failed);
        let name = "pando_volume_latency_seconds";
        page.metric(
            name,
            "histogram",
            "From when a batch of requests was taken to when its answers were shown to the guest.",
        );
        for (row, snapshot, _) in counted {
            for kind in Kind::ALL.into_iter().filter(|kind| snapshot.of(*kind).requests > 0) {
                let of = snapshot.of(kind);
                let labels = [("volume", row.volume.as_str()), ("vm", row.vm.as_str()), ("type", kind.name())];
                let mut below = 0u64;
                for bucket in 0..BUCKETS {
                    below = below.wrapping_add(of.buckets[bucket]);
                    let limit = bucket_limit_ns(bucket).map_or("+Inf".to_owned(), |ns| seconds(ns).to_string());
                    let labels = [&labels[..], &[("le", limit.as_str())]].concat();
                    page.sample(&format!("{name}_bucket"), &labels, below);
                }
                page.sample(&format!("{name}_sum"), &labels, seconds(of.ns));
                page.sample(&format!("{name}_count"), &labels, below);
            }
        }
        page.metric("pando_volume_read_bytes_total", "counter", "Bytes read, by where they came from.");
        for (row, snapshot, _) in counted {
            let sources = &snapshot.sources;
            for (source, bytes) in [("base", sources.base), ("delta", sources.delta), ("zero", sources.zero)] {
                let labels = [("volume", row.volume.as_str()), ("vm", row.vm.as_str()), ("source", source)];
                page.sample("pando_volume_read_bytes_total", &labels, bytes);
            }
        }
        page.metric(
            "pando_volume_held_requests_total",
            "counter",
            "Requests that waited for room in a full file system.",
        );
        for (row, snapshot, _) in counted {
            let labels = [("volume", row.volume.as_str()), ("vm", row.vm.as_str())];
            page.sample("pando_volume_held_requests_total", &labels, snapshot.held);
        }
        let mut gauge = |name: &str, kind: &str, help: &str, of: &dyn Fn(&AttachmentRow, u64) -> u64| {
            page.metric(name, kind, help);
            for (row, _, delta_bytes) in counted {
                let labels = [("volume", row.volume.as_str()), ("vm", row.vm.as_str())];
                page.sample(name, &labels, of(row, *delta_bytes));
            }
        };
        gauge("pando_volume_delta_bytes", "gauge", "What a volume's delta takes on disk.", &|_, bytes| bytes);
        gauge("pando_backend_restarts_total", "counter", "Restarts of a volume's backend.", &|row, _| row.restarts);
        gauge("pando_backend_up", "gauge", "Whether a volume's backend runs.", &|row, _| {
            u64::from(self.backends.is_connected(row.id))
        });
    }

    fn image_metrics(&self, page: &mut Page) -> Result<(), Error> {
        let images = self.catalog.read(|facts| {
            let attachments = facts.attachments()?;
            let with = |image: super::catalog::ImageRow| {
                let count = attachments.iter().filter(|row| row.image == Some(image.digest)).count() as u64;
                Ok::<_, Error>((facts.versions(image.digest)?.pop().unwrap_or_default(), image, count))
            };
            facts.images()?.into_iter().map(with).collect::<Result<Vec<_>, _>>()
        })?;
        let resident = |digest| {
            let file = self.backends.open_image(digest)?;
            file::cached_bytes(&file).ok()
        };
        type Value<'v> = &'v dyn Fn(&super::catalog::ImageRow, u64) -> Option<u64>;
        let mut gauge = |name: &str, help: &str, of: Value<'_>| {
            page.metric(name, "gauge", help);
            for (version, image, count) in &images {
                let digest = image.digest.to_string();
                if let Some(value) = of(image, *count) {
                    page.sample(name, &[("image", digest.as_str()), ("version", version.as_str())], value);
                }
            }
        };
        gauge("pando_image_bytes", "Size of an image.", &|image, _| Some(image.bytes));
        gauge("pando_image_attachments", "VMs' disks that are served from an image.", &|_, count| Some(count));
        gauge("pando_image_resident_bytes", "What of an image that is served is in the page cache.", &|image, _| {
            resident(image.digest)
        });
        gauge(
            "pando_image_saved_bytes",
            "What full copies of the image for each disk served from it would take besides.",
            &|image, count| Some(image.bytes.saturating_mul(count.saturating_sub(1))),
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.metric("m", "gauge", "Help.");
        page.sample("m", &[("a", "x\"y\\z\n")], 3);
        page.sample("m", &[], 1.5);
        assert_eq!(page.text, "# HELP m Help.\n# TYPE m gauge\nm{a=\"x\\\"y\\\\z\\n\"} 3\nm 1.5\n");
    }
}
