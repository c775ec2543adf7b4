"""Where runs are shown and their records are sent: one file per service. Records are written before, and never here."""
