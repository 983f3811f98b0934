-- One row a batch, appended at the right edge of one b-tree: at rest a commit writes one page.
-- The newest batch is never deleted, so head and the chain's last hash are read from it.
CREATE TABLE stream (
    id TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    end_to_end INTEGER NOT NULL  -- 1 once a receiver has confirmed anything of it
) STRICT;
CREATE TABLE batch (
    seq INTEGER PRIMARY KEY,     -- of the first record
    count INTEGER NOT NULL,      -- records; the next batch begins at seq + count
    kind TEXT NOT NULL,
    period INTEGER NOT NULL,     -- seconds that each record of a summary stands for, else 0
    ts INTEGER NOT NULL,         -- up to which its records are, milliseconds
    run_ms INTEGER NOT NULL,     -- how long the journal had been open, in all, when it was written: its age is told by this
    digest BLOB NOT NULL,        -- SHA-256 of the JSON bytes
    link BLOB,                   -- what the next batch carries as prev, where that is not digest: a summary's last_prev
    size INTEGER NOT NULL,       -- of the JSON, bytes
    packed BLOB NOT NULL         -- the JSON as one zstd frame
) STRICT;
CREATE INDEX summary_bytes ON batch (period, length(packed)) WHERE period > 0;
CREATE INDEX summary_seq ON batch (period) WHERE period > 0;
-- The index by time: between which times the records of some neighbouring batches lie, or those of a summary. It costs
-- a row in a hundred batches; what no span covers has to be looked into.
CREATE TABLE span (
    seq INTEGER PRIMARY KEY,     -- of the first batch
    last INTEGER NOT NULL,       -- record of the last batch
    first_ts INTEGER NOT NULL,
    last_ts INTEGER NOT NULL,
    sum INTEGER NOT NULL         -- CRC-32 of the others: a wrong span would hide batches from whoever asks by time
) STRICT;
CREATE TABLE acked (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    sum INTEGER NOT NULL         -- CRC-32 of the others: a wrong range would hide batches that nobody has
) STRICT;
CREATE TABLE reserve (           -- empty but for a moment: what takes room on a disk that others fill
    zeros BLOB NOT NULL
) STRICT;
CREATE TABLE wear (              -- one row, as of the last checkpoint
    run_ms INTEGER NOT NULL,
    readings INTEGER NOT NULL,
    written_bytes INTEGER NOT NULL,
    fsyncs INTEGER NOT NULL,
    sum INTEGER NOT NULL         -- CRC-32 of the others: age is told by run_ms
) STRICT;
