-- The table of the examples' own.
CREATE TABLE orders (
    id    bigint PRIMARY KEY,
    cents bigint NOT NULL CHECK (cents > 0)
);
