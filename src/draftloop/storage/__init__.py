"""SQLite: requests with their traces, adapters, training runs. Knows arrays and rows, no models."""
