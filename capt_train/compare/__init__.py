"""Compare methods on the same splits: configuration, cells, tables, figures."""
