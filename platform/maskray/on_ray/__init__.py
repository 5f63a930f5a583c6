"""The same functions on Ray: the only room that imports it."""
