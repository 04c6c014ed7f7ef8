"""Part: reading the flow."""
