-- The examples' own table.
CREATE TABLE orders (
    id    bigint PRIMARY KEY,
    cents bigint NOT NULL CHECK (cents > 0)
);
