"""How a service on many machines behaves, without any machine."""
