// Publishes from Node.js, by one statement in the application's own transaction.

import pg from 'pg'

// Inserts the order and publishes it in one transaction. If the order is refused, its
// event is rolled back.
async function placeOrder(client, orderID, cents) {
  await client.query('BEGIN')
  try {
    // The function returns the event's id.
    await client.query('SELECT diehard_publish($1, $2)', ['order_placed', JSON.stringify({ order_id: orderID, cents })])
    await client.query('INSERT INTO orders (id, cents) VALUES ($1, $2)', [orderID, cents])
    await client.query('COMMIT')
  } catch (error) {
    await client.query('ROLLBACK')
    throw error
  }
}

const client = new pg.Client({ connectionString: process.env.DATABASE_URL })
await client.connect()
// The table accepts the first order and refuses the second.
for (const [orderID, cents] of [[1, 4200], [2, -1]]) {
  try {
    await placeOrder(client, orderID, cents)
  } catch (error) {
    console.log('order', orderID, 'was refused:', error.message)
  }
}
await client.end()
