"""What the topics talk about: data as constants, and small helpers of wording."""
