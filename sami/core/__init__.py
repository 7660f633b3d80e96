"""What any run is made of, whatever the method."""
