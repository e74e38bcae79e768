import asyncio, time, os, psutil
from tests.security.test_network import *
from tests.security.test_network import _ASK
from prism.agent.v1 import agent_pb2
async def test_flood_cpu(gateway, agent, world):
    sandbox = await make(gateway, "sb-1", egress(names=[pb.EgressName(name="*")]))
    process = psutil.Process(agent.pid)
    for name, body in {
     "idle": "time.sleep(4)",
     "udp": "one=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\nwhile time.time()<end:\n  one.sendto(b'x', ('127.0.0.53',53))",
     "udp big": "n=110;q=question([b'good',b'example',b'org'],1);q=q[:6]+struct.pack('>H',n)+q[8:]+(b'\\xc0\\x0c'+struct.pack('>HHIH',65280,1,0,0))*90\none=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\nwhile time.time()<end:\n  one.sendto(q[:6]+struct.pack('>H',90)+q[8:], ('127.0.0.53',53)); time.sleep(0.002)",
     "tcp": "while time.time()<end:\n  one=socket.socket(); one.settimeout(1)\n  try: one.connect(('127.0.0.53',53))\n  except OSError: pass\n  one.close()",
    }.items():
        b = process.cpu_times(); t = time.monotonic()
        r = await agent.python(sandbox, "import time\nend=time.time()+4\n" + _ASK + body)
        a = process.cpu_times()
        print(name, r.code, r.stderr[-200:], round((a.user+a.system-b.user-b.system)/(time.monotonic()-t)*100), "% of a core", flush=True)
    # mtime
    r = await agent.python(sandbox, "import os\nopen('/workspace/f','w')\nos.utime('/workspace/f',(999999999999,999999999999))")
    print(r)
    try:
        print(await agent.stub.ListFiles(pb.ListFilesRequest(sandbox=sandbox, path="/workspace")))
    except Exception as e: print("LIST", e)
    # host to sandbox
    address = (await agent.run(sandbox, ["hostname", "-I"])).stdout.decode().strip()
    print(address)
async def test_reuse(gateway, agent, world):
    s1 = await make(gateway, "sb-1", egress(rule(PUBLIC, 80, protocol=UDP)))
    addr = (await agent.run(s1, ["hostname", "-I"])).stdout
    prog = f"import socket\nu=socket.socket(socket.AF_INET,socket.SOCK_DGRAM);u.settimeout(2);u.bind(('',5555))\nfor _ in range(3):\n  u.sendto(b'x',('{PUBLIC}',80));print(u.recv(99))"
    print(await agent.python(s1, prog))
    gateway.want(s1, agent_pb2.DESIRED_STATE_DELETED, grace_s=0)
    await gateway.wait_for(s1, agent_pb2.OBSERVED_STATE_DELETED)
    await agent.kill()
    await agent.start()
    await gateway.wait_registrations(2)
    s2 = await make(gateway, "sb-2", egress(rule(NAMED, 80)))
    print(addr, (await agent.run(s2, ["hostname", "-I"])).stdout)
    print("REUSE", await agent.python(s2, prog))
