"""The console: pages for people, on the operations of the API."""
