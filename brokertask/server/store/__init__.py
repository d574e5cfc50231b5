"""The store of a server: SQLite or PostgreSQL, by one code path."""
