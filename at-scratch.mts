const { openBackend } = await import('./src/backends/registry.ts');
const be: any = await openBackend('cpu', {});
const [H, KV, D, cap] = [16, 8, 128, 512];
const res: any = {};
for (const B of [12, 32]) {
  const caches: any = { f32: await be.createKvCache({ batch: B, kvHeads: KV, headDim: D, capacity: cap }), kv8: await be.createKvCache({ batch: B, kvHeads: KV, headDim: D, capacity: cap, grid: { bits: 8, clip: 1 } }), kv4: await be.createKvCache({ batch: B, kvHeads: KV, headDim: D, capacity: cap, grid: { bits: 4, clip: 1 } }) };
  const more: any = { f32: [], kv8: [], kv4: [] };
  const mk = (n: number) => be.upload({ dtype: 'f32', shape: [B, n], data: Float32Array.from({ length: B * n }, (_, i) => Math.sin(i * 1.7)) });
  const q = await mk(H * D), k = await mk(KV * D), v = await mk(KV * D);
  const run = async (c: any, start: number) => { const y = await be.attention(q, k, v, { heads: H, kvHeads: KV, headDim: D, batch: B, start, scale: D ** -.5, cache: c }); be.free(y); };
  for (let s = 0; s < 256; s += 16) for (const c of Object.values(caches)) await run(c, s);
  for (let r = 0; r < 40; r++) for (const n of Object.keys(caches)) { const c0 = process.cpuUsage(); const t0 = performance.now(); await run(caches[n], 256 + r); const c = process.cpuUsage(c0); (res[n + ' ' + B] ??= []).push([(c.user + c.system) / 1e3 / B, (performance.now() - t0) / B]); }
}
for (const [k, v] of Object.entries(res) as any) console.log(k, 'ms per sequence: cpu median', v.map((z: any) => z[0]).sort((a: number, b: number) => a - b)[20].toFixed(3), 'wall best', Math.min(...v.map((z: any) => z[1])).toFixed(3));
await be.dispose();
