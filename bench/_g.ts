import { KernelPool, rotationTable } from '../src/backends/cpu/kernels.js';
const pool = await KernelPool.create({ threads: 1 });
pool.ensureScratch(4<<20);
const { arena } = pool; const G=128,K=8,C=4096,N=4096,CH=Number(process.env.CH);
const pairs = new Int16Array(K*C); for (let at=0;at<pairs.length;at+=G) pairs.set(Array.from({length:G},(_,i)=>i).sort(()=>Math.random()-.5),at);
const table=rotationTable(pool,{channels:C,groupSize:G,krot:K,pairs},new Float32Array(K*C/2).fill(0.3));
const m=()=>{const w=arena.alloc(C*N*4);arena.f32.fill(.5,w>>>2,(w>>>2)+C*N);return w;}; const [a,b,c]=[m(),m(),m()]; const sums=arena.alloc(N/64*K*C/2*8);
const cpu=()=>{const u=process.cpuUsage();return (u.user+u.system)/1000;};
const t:number[]=[],p:number[]=[];
for(let r=0;r<15;r++){let s=cpu();pool.run('multiplyAddPeak',1000000,[]);p.push(96/(cpu()-s));s=cpu();pool.run('rotationGradient',32*(N/CH),[a,b,c,N,G,K,table,sums,32]);t.push((cpu()-s)/(C*N/1e6));}
t.sort((x,y)=>x-y);p.sort((x,y)=>x-y);console.log(CH,'grad ns/elem',t[0].toFixed(2),t[3].toFixed(2),t[7].toFixed(2),'peak MF',(p[7]/1e3).toFixed(1));
process.exit(0)
