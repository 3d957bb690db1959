"""What a method is, and the games that methods are written on."""
