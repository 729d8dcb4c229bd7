"""Who gives way to whom: exchanges, victims, claims on places, reservations, moves that make room."""
