"""What tests the papers: experiments on their claims, and their figures done again. No other room imports it."""
