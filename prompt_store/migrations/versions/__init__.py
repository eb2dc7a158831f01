"""One module per step of the schema, in order. A step that was released is never edited."""
