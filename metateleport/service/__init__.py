"""Group elements, gauges and step factors as a service: what is asked, what is answered, and who asks."""

from metateleport.service.answering import Answerer
from metateleport.service.client import Client, ServiceError
from metateleport.service.limits import Limits
from metateleport.service.message import Message, Refused
from metateleport.service.remote import connect
from metateleport.service.routes import Guard, add_routes

__all__ = [
    "Answerer",
    "Client",
    "Guard",
    "Limits",
    "Message",
    "Refused",
    "ServiceError",
    "add_routes",
    "connect",
]
