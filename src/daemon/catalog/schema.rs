//! The tables, one step for each version of them.
//!
//! A step is never changed once it has been released: `PRAGMA user_version` says how many of them a database has seen.

/// The steps, from nothing to now.
pub const STEPS: [&str; 4] = [FIRST, HOLD, BACKENDS_OWN_USERS, DIRECT];

/// How long writes wait while a volume's file system is full; 0: they fail at once.
const HOLD: &str = "ALTER TABLE volume ADD COLUMN hold_ms INTEGER NOT NULL DEFAULT 60000;";

/// Whether the data of an attachment's delta goes past the page cache.
const DIRECT: &str = "ALTER TABLE attachment ADD COLUMN direct INTEGER NOT NULL DEFAULT 0;";

const FIRST: &str = "
-- Numbers that outlive the daemon.
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;

-- Images on this host. 'importing' rows stand for files that are about to appear, 'removing' for ones about to go.
CREATE TABLE image (
    digest TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL,
    format TEXT NOT NULL,
    verity INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('importing', 'verified', 'corrupt', 'removing')),
    verified_at INTEGER NOT NULL,
    imported_at INTEGER NOT NULL,
    imported_by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE version (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES image (digest) ON DELETE CASCADE,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX version_image ON version (image);

CREATE TABLE channel (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES image (digest),
    moved_at INTEGER NOT NULL,
    moved_by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
-- Images of the past may be gone by now.
CREATE TABLE channel_move (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    channel TEXT NOT NULL,
    action TEXT NOT NULL,
    image TEXT NOT NULL,
    previous TEXT,
    -- What image was called when it happened.
    version TEXT,
    at INTEGER NOT NULL,
    by TEXT NOT NULL
) STRICT;
CREATE INDEX channel_move_channel ON channel_move (channel, id);

-- 'image' is what the delta of a persistent cow volume was made on; other volumes have only a target.
CREATE TABLE volume (
    name TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('cow', 'read-only', 'blank')),
    ephemeral INTEGER NOT NULL,
    channel TEXT REFERENCES channel (name),
    image TEXT REFERENCES image (digest),
    target TEXT REFERENCES image (digest),
    bytes INTEGER,
    cluster_bytes INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('creating', 'ready', 'removing')),
    created_at INTEGER NOT NULL,
    created_by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX volume_channel ON volume (channel);
-- Files of deltas. A row precedes its file and outlives it, so that no file is ever without one.
CREATE TABLE delta (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    volume TEXT NOT NULL REFERENCES volume (name),
    image TEXT REFERENCES image (digest),
    state TEXT NOT NULL CHECK (state IN ('making', 'current', 'staged', 'doomed'))
) STRICT;
CREATE INDEX delta_volume ON delta (volume);

-- Which VM a volume belongs to, also while it is not attached; 'target' is a deployment's word for this VM.
CREATE TABLE placement (
    vm TEXT NOT NULL,
    volume TEXT NOT NULL REFERENCES volume (name) ON DELETE CASCADE,
    role TEXT,
    target TEXT REFERENCES image (digest),
    PRIMARY KEY (vm, volume)
) STRICT, WITHOUT ROWID;
CREATE INDEX placement_volume ON placement (volume);

CREATE TABLE attachment (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    vm TEXT NOT NULL,
    volume TEXT NOT NULL REFERENCES volume (name),
    role TEXT,
    serial TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    queues INTEGER NOT NULL,
    kernel_from_vmm INTEGER NOT NULL,
    -- What is served, what comes next, and what was before.
    image TEXT REFERENCES image (digest),
    staged TEXT REFERENCES image (digest),
    previous TEXT,
    state TEXT NOT NULL CHECK (state IN ('starting', 'running', 'failed', 'stopping')),
    error TEXT,
    restarts INTEGER NOT NULL DEFAULT 0,
    -- Whose the front ends' socket is.
    owner_uid INTEGER NOT NULL,
    owner_gid INTEGER NOT NULL,
    at INTEGER NOT NULL,
    by TEXT NOT NULL,
    UNIQUE (vm, volume)
) STRICT;
CREATE INDEX attachment_volume ON attachment (volume);

CREATE TABLE grp (name TEXT PRIMARY KEY, at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE member (
    grp TEXT NOT NULL REFERENCES grp (name) ON DELETE CASCADE,
    member TEXT NOT NULL,
    PRIMARY KEY (grp, member)
) STRICT, WITHOUT ROWID;
CREATE INDEX member_member ON member (member);
CREATE TABLE permission (
    grp TEXT NOT NULL REFERENCES grp (name) ON DELETE CASCADE,
    verb TEXT NOT NULL,
    pattern TEXT NOT NULL,
    PRIMARY KEY (grp, verb, pattern)
) STRICT, WITHOUT ROWID;

CREATE TABLE deployment (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    image TEXT NOT NULL,
    channel TEXT,
    grp TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('rolling', 'done', 'aborted', 'rolled-back')),
    at INTEGER NOT NULL,
    by TEXT NOT NULL
) STRICT;
CREATE TABLE deployment_target (
    deployment INTEGER NOT NULL REFERENCES deployment (id),
    vm TEXT NOT NULL,
    volume TEXT NOT NULL,
    state TEXT NOT NULL,
    error TEXT,
    -- The placement's own target and the image before the deployment.
    previous_target TEXT,
    previous TEXT,
    PRIMARY KEY (deployment, vm, volume)
) STRICT, WITHOUT ROWID;
CREATE INDEX deployment_target_volume ON deployment_target (volume);

CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    object TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    object TEXT NOT NULL,
    state TEXT NOT NULL,
    result TEXT,
    error TEXT,
    at INTEGER NOT NULL,
    by TEXT NOT NULL
) STRICT;

-- Only ever added to.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    principal TEXT NOT NULL,
    process INTEGER NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    outcome TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
";

const BACKENDS_OWN_USERS: &str = "
-- Whom the backend runs as, if it has a user of its own. No two have the same.
ALTER TABLE attachment ADD COLUMN backend_uid INTEGER;
CREATE UNIQUE INDEX attachment_backend_uid ON attachment (backend_uid);
";
