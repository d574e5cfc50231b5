"""Transports: interchangeable ways to reach a broker, all behind the port in `transport.base`."""
