"""Where a store keeps its tables: transactions of SQLite and of Postgres, the schema, and the store's time."""
