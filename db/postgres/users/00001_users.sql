-- +goose Up

CREATE TABLE {schema}users (
    -- UUID v7, made by the application: PostgreSQL has uuidv7() from version 18 only.
    -- The ids increase with time, and lists are ordered and paged by them.
    id         uuid             PRIMARY KEY,
    -- Addresses are ASCII (a domain in its xn-- form). Under collation C lower() folds
    -- exactly A-Z, whatever the database's locale is. Under Turkish rules lower('I')
    -- is not 'i', and one address could be taken twice.
    email      text COLLATE "C" NOT NULL
        CONSTRAINT users_email_is_short CHECK (octet_length(email) BETWEEN 3 AND 254),
    first_name text             NOT NULL DEFAULT ''
        CONSTRAINT users_first_name_is_short CHECK (char_length(first_name) <= 100),
    last_name  text             NOT NULL DEFAULT ''
        CONSTRAINT users_last_name_is_short CHECK (char_length(last_name) <= 100),
    created_at timestamptz      NOT NULL,
    updated_at timestamptz      NOT NULL
);

-- One user for an address, in whatever case it is written. The index decides, not a
-- look before the insert: of concurrent creates one wins.
CREATE UNIQUE INDEX users_email_key ON {schema}users (lower(email));

-- The answers to requests with an Idempotency-Key that changed something. A row
-- commits with the change that it answers: there is never one without the other.
CREATE TABLE {schema}idempotency_keys (
    key         text COLLATE "C" PRIMARY KEY
        CONSTRAINT idempotency_key_is_short CHECK (octet_length(key) BETWEEN 1 AND 255),
    -- SHA-256 of the request: another request with the same key is refused.
    fingerprint bytea       NOT NULL,
    status      int         NOT NULL,
    location    text        NOT NULL,
    body        bytea       NOT NULL,
    expires_at  timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0.05
);

-- For the deletion of expired keys.
CREATE INDEX idempotency_keys_expires_at ON {schema}idempotency_keys (expires_at);

-- +goose Down
DROP TABLE {schema}idempotency_keys;
DROP TABLE {schema}users;
