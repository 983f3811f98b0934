-- One row a batch, appended at the right edge of one b-tree: at rest a commit writes one page.
-- The newest batch is never deleted, so head and the chain's last hash are read from it.
CREATE TABLE stream (
    id TEXT NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE batch (
    seq INTEGER PRIMARY KEY,     -- of the first record
    count INTEGER NOT NULL,      -- records; the next batch begins at seq + count
    kind TEXT NOT NULL,
    ts INTEGER NOT NULL,         -- greatest of its records, milliseconds
    digest BLOB NOT NULL,        -- SHA-256 of the JSON bytes
    size INTEGER NOT NULL,       -- of the JSON, bytes
    packed BLOB NOT NULL         -- the JSON as one zstd frame
) STRICT;
CREATE TABLE acked (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    sum INTEGER NOT NULL         -- CRC-32 of both: a wrong range would hide batches that nobody has
) STRICT;
