"""The HTTP API of a server, `/api/v1`: what `brokertask runs` and the console stand on."""
