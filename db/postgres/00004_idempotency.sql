-- +goose Up

-- Answers to requests with an Idempotency-Key that changed something, for their
-- repetitions. A row commits with the change that it answers: there is never
-- one without the other.
CREATE TABLE idempotency_keys (
    key         text COLLATE "C" PRIMARY KEY
        CONSTRAINT idempotency_key_is_short CHECK (octet_length(key) BETWEEN 1 AND 255),
    -- SHA-256 of what the request asked for: another request under the key is
    -- refused.
    fingerprint bytea       NOT NULL,
    status      int         NOT NULL,
    location    text        NOT NULL,
    body        bytea       NOT NULL,
    expires_at  timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0.05
);

-- For the clean-up.
CREATE INDEX idempotency_keys_expires_at ON idempotency_keys (expires_at);

-- +goose Down
DROP TABLE idempotency_keys;
