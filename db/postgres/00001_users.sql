-- +goose Up

CREATE TABLE users (
    -- UUID v7, made by the application (PostgreSQL has uuidv7() only from 18
    -- on): ids rise with time, which is what lists are ordered and paged by.
    id         uuid             PRIMARY KEY,
    -- Addresses are ASCII (a domain in its xn-- form). Under collation C
    -- lower() folds exactly A-Z, whatever the database's locale is: under
    -- Turkish rules lower('I') is not 'i', and one address could be taken
    -- twice.
    email      text COLLATE "C" NOT NULL
        CONSTRAINT users_email_is_short CHECK (octet_length(email) BETWEEN 3 AND 254),
    first_name text             NOT NULL DEFAULT ''
        CONSTRAINT users_first_name_is_short CHECK (char_length(first_name) <= 100),
    last_name  text             NOT NULL DEFAULT ''
        CONSTRAINT users_last_name_is_short CHECK (char_length(last_name) <= 100),
    created_at timestamptz      NOT NULL,
    updated_at timestamptz      NOT NULL
);

-- One user for an address, however its letters are written. The index decides,
-- not a look before the insert: of concurrent creates one wins.
CREATE UNIQUE INDEX users_email_key ON users (lower(email));

-- +goose Down
DROP TABLE users;
