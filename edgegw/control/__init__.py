"""Local control: rules, who may set what, the guard before every write, and the ledger of it all."""
