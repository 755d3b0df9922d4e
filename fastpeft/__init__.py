"""fastpeft."""
