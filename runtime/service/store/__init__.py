"""The job store: every job, from its submission to the removal of its result, in SQLite or Postgres."""
