"""Files that travel with a student; they import nothing of diffdistill."""
