"""Models behind one `load(name)`: packaged, tiny, local or from the Hub."""
