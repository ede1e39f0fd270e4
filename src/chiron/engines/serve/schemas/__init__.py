"""JSON of a schema: read, turned into grammars, made up."""
