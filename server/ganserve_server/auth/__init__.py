"""Who may call: TLS certificates, bearer tokens and their rates.

Knows neither models nor services. It may import the transport's interface; the transport may not import it.
"""
