"""What `diffdistill verify` checks a method against: closed forms, and mistakes that must be caught."""
