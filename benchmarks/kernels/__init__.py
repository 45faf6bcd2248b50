"""The operators beside their peers: who agrees with the definition, how long they take and how much memory."""
