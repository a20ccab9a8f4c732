"""What FedPact ships as a Flower app. It imports nothing but the standard library and Flower."""
