"""Label more photos than one process should: parts of them on Ray, rows as Parquet."""
