"""Steps, records, sessions, the notebook runner, the report, the command line. This room is light: heavy imports stand in functions."""
