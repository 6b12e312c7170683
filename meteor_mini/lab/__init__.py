"""What is measured and drawn: tables, peers, speed, figures."""
