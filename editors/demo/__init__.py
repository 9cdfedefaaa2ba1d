"""The whole loop on a model trained on the spot: measure, localize, unlearn, edit a fact, ship, verify, report.

Everything is real and seeded; the page it writes states what was found, whichever way it came out.
"""
